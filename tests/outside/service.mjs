// The whole service from another language: service.mjs ADDRESS PROTO_FOLDER PICTURE MEGABYTES
// Streams a raw picture of so many megabytes, sends a batch of 50 pictures of which 5 are broken, asks for health, and
// prints what came back as JSON.
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, folder, picture, megabytes] = process.argv.slice(2);
const definition = loader.loadSync("hourglass/v1/codec.proto", { includeDirs: [folder], keepCase: true, enums: String });
const { CodecService } = grpc.loadPackageDefinition(definition).hourglass.v1;
const client = new CodecService(address, grpc.credentials.createInsecure());
const file = readFileSync(picture);

// A smooth picture, 3000 wide; its rows are made as they are sent.
const width = 3000;
const height = Math.ceil((Number(megabytes) * 1e6) / (3 * width));
const row = Buffer.alloc(3 * width);
for (let x = 0; x < width; x++) row.fill((x * 255) / width, 3 * x, 3 * x + 3);

async function send(call, message) {
  if (!call.write(message)) await new Promise((resolve) => call.once("drain", resolve));
}

async function stream() {
  const call = client.EncodeStream();
  const parts = [];
  let answer;
  const ended = new Promise((resolve, reject) => {
    call.on("data", (message) => (message.answer ? (answer = message.answer) : parts.push(message.chunk)));
    call.on("end", resolve);
    call.on("error", reject);
  });
  const pixels = { width, height, channels: 3 };
  await send(call, { start: { request: { quality: 10 }, pixels, total_bytes: row.length * height } });
  const rows = 100;
  for (let y = 0; y < height; y += rows) {
    await send(call, { chunk: Buffer.concat(Array(Math.min(rows, height - y)).fill(row)) });
  }
  call.end();
  await ended;
  const whole = Buffer.concat(parts);
  return { bytes: whole.length, said: Number(answer.total_bytes), magic: whole.subarray(1, 4).toString(), height };
}

async function batch() {
  const call = client.EncodeBatch();
  const answers = {};
  const ended = new Promise((resolve, reject) => {
    call.on("data", (message) => (answers[message.id] = message));
    call.on("end", resolve);
    call.on("error", reject);
  });
  for (let number = 0; number < 50; number++) {
    const image_file = number % 10 === 3 ? Buffer.from("broken") : file;
    await send(call, { id: `p${number}`, request: { image_file, quality: 20 } });
  }
  call.end();
  await ended;
  const all = Object.values(answers);
  const good = all.filter((answer) => answer.response);
  const digests = new Set(good.map((answer) => createHash("sha256").update(answer.response.file).digest("hex")));
  const failures = all.filter((answer) => answer.failure).map((answer) => answer.failure);
  return {
    answers: all.length,
    digests: [...digests],
    broken: Object.keys(answers).filter((id) => answers[id].failure).sort(),
    codes: [...new Set(failures.map((failure) => failure.code))],
  };
}

const unary = await new Promise((resolve, reject) =>
  client.Encode({ image_file: file, quality: 20 }, (error, answer) => (error ? reject(error) : resolve(answer))),
);
const digest = createHash("sha256").update(unary.file).digest("hex");
console.log(JSON.stringify({ digest, stream: await stream(), batch: await batch() }));
client.close();
