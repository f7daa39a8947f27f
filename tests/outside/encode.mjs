// A client in another language: encode.mjs ADDRESS PROTO_FOLDER PICTURE OUT [QUALITY]
// Encodes PICTURE by gRPC, writes the .hgc file to OUT, then sends rubbish and prints how it was refused.
import { readFileSync, writeFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, folder, picture, out, quality = "50"] = process.argv.slice(2);
const definition = loader.loadSync("hourglass/v1/codec.proto", { includeDirs: [folder], keepCase: true, enums: String });
const { CodecService } = grpc.loadPackageDefinition(definition).hourglass.v1;
const client = new CodecService(address, grpc.credentials.createInsecure());
const call = (method, request) =>
  new Promise((resolve) => client[method](request, (error, answer) => resolve({ error, answer })));

const { error, answer } = await call("Encode", {
  image_file: readFileSync(picture),
  quality: Number(quality),
  want_file: true,
  want_distortion: true,
});
if (error) throw error;
writeFileSync(out, answer.file);
const refused = await call("Decode", { file: Buffer.from("rubbish") });
console.log(
  JSON.stringify({
    bytes: answer.file.length,
    width: answer.width,
    height: answer.height,
    psnr: answer.distortion.psnr,
    refused: refused.error.code === grpc.status.INVALID_ARGUMENT,
    why: refused.error.details,
  }),
);
client.close();
