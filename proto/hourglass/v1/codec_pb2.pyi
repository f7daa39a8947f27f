from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_INT16: _ClassVar[DataType]

class MetadataKept(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    METADATA_KEPT_UNSPECIFIED: _ClassVar[MetadataKept]
    METADATA_KEPT_ICC: _ClassVar[MetadataKept]
    METADATA_KEPT_NONE: _ClassVar[MetadataKept]

class Effort(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EFFORT_UNSPECIFIED: _ClassVar[Effort]
    EFFORT_FAST: _ClassVar[Effort]
    EFFORT_BEST: _ClassVar[Effort]

class ImageFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FORMAT_UNSPECIFIED: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_JPEG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_WEBP: _ClassVar[ImageFormat]
    IMAGE_FORMAT_AVIF: _ClassVar[ImageFormat]
    IMAGE_FORMAT_TIFF: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PPM: _ClassVar[ImageFormat]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_INT16: DataType
METADATA_KEPT_UNSPECIFIED: MetadataKept
METADATA_KEPT_ICC: MetadataKept
METADATA_KEPT_NONE: MetadataKept
EFFORT_UNSPECIFIED: Effort
EFFORT_FAST: Effort
EFFORT_BEST: Effort
IMAGE_FORMAT_UNSPECIFIED: ImageFormat
IMAGE_FORMAT_PNG: ImageFormat
IMAGE_FORMAT_JPEG: ImageFormat
IMAGE_FORMAT_WEBP: ImageFormat
IMAGE_FORMAT_AVIF: ImageFormat
IMAGE_FORMAT_TIFF: ImageFormat
IMAGE_FORMAT_PPM: ImageFormat

class Pixels(_message.Message):
    __slots__ = ("width", "height", "data", "channels")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    data: bytes
    channels: int
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., data: _Optional[bytes] = ..., channels: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "shape", "data_type", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data_type: DataType
    data: bytes
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data_type: _Optional[_Union[DataType, str]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Code(_message.Message):
    __slots__ = ("model", "quality", "width", "height", "tensors", "grey")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    GREY_FIELD_NUMBER: _ClassVar[int]
    model: str
    quality: float
    width: int
    height: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    grey: bool
    def __init__(self, model: _Optional[str] = ..., quality: _Optional[float] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., grey: _Optional[bool] = ...) -> None: ...

class Distortion(_message.Message):
    __slots__ = ("psnr", "ms_ssim")
    PSNR_FIELD_NUMBER: _ClassVar[int]
    MS_SSIM_FIELD_NUMBER: _ClassVar[int]
    psnr: float
    ms_ssim: float
    def __init__(self, psnr: _Optional[float] = ..., ms_ssim: _Optional[float] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("image_file", "pixels", "quality", "target_size", "target_bpp", "target_psnr", "model", "want_file", "want_code", "want_distortion", "effort", "metadata", "srgb", "frame", "no_fallback", "no_grey_model")
    IMAGE_FILE_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    TARGET_SIZE_FIELD_NUMBER: _ClassVar[int]
    TARGET_BPP_FIELD_NUMBER: _ClassVar[int]
    TARGET_PSNR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WANT_FILE_FIELD_NUMBER: _ClassVar[int]
    WANT_CODE_FIELD_NUMBER: _ClassVar[int]
    WANT_DISTORTION_FIELD_NUMBER: _ClassVar[int]
    EFFORT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    SRGB_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    NO_FALLBACK_FIELD_NUMBER: _ClassVar[int]
    NO_GREY_MODEL_FIELD_NUMBER: _ClassVar[int]
    image_file: bytes
    pixels: Pixels
    quality: float
    target_size: int
    target_bpp: float
    target_psnr: float
    model: str
    want_file: bool
    want_code: bool
    want_distortion: bool
    effort: Effort
    metadata: MetadataKept
    srgb: bool
    frame: int
    no_fallback: bool
    no_grey_model: bool
    def __init__(self, image_file: _Optional[bytes] = ..., pixels: _Optional[_Union[Pixels, _Mapping]] = ..., quality: _Optional[float] = ..., target_size: _Optional[int] = ..., target_bpp: _Optional[float] = ..., target_psnr: _Optional[float] = ..., model: _Optional[str] = ..., want_file: _Optional[bool] = ..., want_code: _Optional[bool] = ..., want_distortion: _Optional[bool] = ..., effort: _Optional[_Union[Effort, str]] = ..., metadata: _Optional[_Union[MetadataKept, str]] = ..., srgb: _Optional[bool] = ..., frame: _Optional[int] = ..., no_fallback: _Optional[bool] = ..., no_grey_model: _Optional[bool] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("file", "code", "distortion", "model", "quality", "width", "height", "warnings", "lossless")
    FILE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    DISTORTION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    LOSSLESS_FIELD_NUMBER: _ClassVar[int]
    file: bytes
    code: Code
    distortion: Distortion
    model: str
    quality: float
    width: int
    height: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    lossless: bool
    def __init__(self, file: _Optional[bytes] = ..., code: _Optional[_Union[Code, _Mapping]] = ..., distortion: _Optional[_Union[Distortion, _Mapping]] = ..., model: _Optional[str] = ..., quality: _Optional[float] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ..., lossless: _Optional[bool] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("x", "y", "width", "height")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    x: int
    y: int
    width: int
    height: int
    def __init__(self, x: _Optional[int] = ..., y: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class Metadata(_message.Message):
    __slots__ = ("icc", "exif", "xmp", "iptc")
    ICC_FIELD_NUMBER: _ClassVar[int]
    EXIF_FIELD_NUMBER: _ClassVar[int]
    XMP_FIELD_NUMBER: _ClassVar[int]
    IPTC_FIELD_NUMBER: _ClassVar[int]
    icc: bytes
    exif: bytes
    xmp: bytes
    iptc: bytes
    def __init__(self, icc: _Optional[bytes] = ..., exif: _Optional[bytes] = ..., xmp: _Optional[bytes] = ..., iptc: _Optional[bytes] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("file", "code", "format", "region", "scale", "salvage")
    FILE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SALVAGE_FIELD_NUMBER: _ClassVar[int]
    file: bytes
    code: Code
    format: ImageFormat
    region: Region
    scale: int
    salvage: bool
    def __init__(self, file: _Optional[bytes] = ..., code: _Optional[_Union[Code, _Mapping]] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., region: _Optional[_Union[Region, _Mapping]] = ..., scale: _Optional[int] = ..., salvage: _Optional[bool] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("pixels", "image_file", "model", "quality", "metadata", "damage", "warnings")
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FILE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    DAMAGE_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    pixels: Pixels
    image_file: bytes
    model: str
    quality: float
    metadata: Metadata
    damage: _containers.RepeatedScalarFieldContainer[str]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, pixels: _Optional[_Union[Pixels, _Mapping]] = ..., image_file: _Optional[bytes] = ..., model: _Optional[str] = ..., quality: _Optional[float] = ..., metadata: _Optional[_Union[Metadata, _Mapping]] = ..., damage: _Optional[_Iterable[str]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "default_model", "server_version", "max_pixels", "max_message_bytes", "max_stream_bytes")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MODEL_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    default_model: str
    server_version: str
    max_pixels: int
    max_message_bytes: int
    max_stream_bytes: int
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., default_model: _Optional[str] = ..., server_version: _Optional[str] = ..., max_pixels: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_stream_bytes: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("id", "tensors", "manifest_json")
    ID_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    id: str
    tensors: _containers.RepeatedCompositeFieldContainer[TensorRule]
    manifest_json: str
    def __init__(self, id: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[TensorRule, _Mapping]]] = ..., manifest_json: _Optional[str] = ...) -> None: ...

class TensorRule(_message.Message):
    __slots__ = ("name", "channels", "stride", "whole")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    channels: int
    stride: int
    whole: int
    def __init__(self, name: _Optional[str] = ..., channels: _Optional[int] = ..., stride: _Optional[int] = ..., whole: _Optional[int] = ...) -> None: ...

class EncodeStreamRequest(_message.Message):
    __slots__ = ("start", "chunk")
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    start: EncodeStart
    chunk: bytes
    def __init__(self, start: _Optional[_Union[EncodeStart, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class EncodeStart(_message.Message):
    __slots__ = ("request", "pixels", "total_bytes")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    request: EncodeRequest
    pixels: Pixels
    total_bytes: int
    def __init__(self, request: _Optional[_Union[EncodeRequest, _Mapping]] = ..., pixels: _Optional[_Union[Pixels, _Mapping]] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class EncodeStreamResponse(_message.Message):
    __slots__ = ("answer", "chunk")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    answer: EncodeAnswer
    chunk: bytes
    def __init__(self, answer: _Optional[_Union[EncodeAnswer, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class EncodeAnswer(_message.Message):
    __slots__ = ("response", "total_bytes")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    response: EncodeResponse
    total_bytes: int
    def __init__(self, response: _Optional[_Union[EncodeResponse, _Mapping]] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class DecodeStreamRequest(_message.Message):
    __slots__ = ("start", "chunk")
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    start: DecodeStart
    chunk: bytes
    def __init__(self, start: _Optional[_Union[DecodeStart, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class DecodeStart(_message.Message):
    __slots__ = ("request", "is_code", "total_bytes")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    IS_CODE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    request: DecodeRequest
    is_code: bool
    total_bytes: int
    def __init__(self, request: _Optional[_Union[DecodeRequest, _Mapping]] = ..., is_code: _Optional[bool] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class DecodeStreamResponse(_message.Message):
    __slots__ = ("answer", "chunk")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    answer: DecodeAnswer
    chunk: bytes
    def __init__(self, answer: _Optional[_Union[DecodeAnswer, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class DecodeAnswer(_message.Message):
    __slots__ = ("response", "total_bytes")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    response: DecodeResponse
    total_bytes: int
    def __init__(self, response: _Optional[_Union[DecodeResponse, _Mapping]] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class EncodeBatchRequest(_message.Message):
    __slots__ = ("id", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    request: EncodeRequest
    def __init__(self, id: _Optional[str] = ..., request: _Optional[_Union[EncodeRequest, _Mapping]] = ...) -> None: ...

class EncodeBatchResponse(_message.Message):
    __slots__ = ("id", "response", "failure")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    id: str
    response: EncodeResponse
    failure: Failure
    def __init__(self, id: _Optional[str] = ..., response: _Optional[_Union[EncodeResponse, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class DecodeBatchRequest(_message.Message):
    __slots__ = ("id", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    request: DecodeRequest
    def __init__(self, id: _Optional[str] = ..., request: _Optional[_Union[DecodeRequest, _Mapping]] = ...) -> None: ...

class DecodeBatchResponse(_message.Message):
    __slots__ = ("id", "response", "failure")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    id: str
    response: DecodeResponse
    failure: Failure
    def __init__(self, id: _Optional[str] = ..., response: _Optional[_Union[DecodeResponse, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "reason", "retry_milliseconds")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    reason: str
    retry_milliseconds: int
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ..., retry_milliseconds: _Optional[int] = ...) -> None: ...

class FeaturesRequest(_message.Message):
    __slots__ = ("image_file", "pixels", "file", "model")
    IMAGE_FILE_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    image_file: bytes
    pixels: Pixels
    file: bytes
    model: str
    def __init__(self, image_file: _Optional[bytes] = ..., pixels: _Optional[_Union[Pixels, _Mapping]] = ..., file: _Optional[bytes] = ..., model: _Optional[str] = ...) -> None: ...

class FeaturesResponse(_message.Message):
    __slots__ = ("values", "model", "warnings")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    model: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[float]] = ..., model: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("file",)
    FILE_FIELD_NUMBER: _ClassVar[int]
    file: bytes
    def __init__(self, file: _Optional[bytes] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("format_version", "model", "width", "height", "quality", "total_bytes", "decodable", "sections", "grey", "lossless")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DECODABLE_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    GREY_FIELD_NUMBER: _ClassVar[int]
    LOSSLESS_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    model: str
    width: int
    height: int
    quality: float
    total_bytes: int
    decodable: bool
    sections: _containers.RepeatedCompositeFieldContainer[Section]
    grey: bool
    lossless: bool
    def __init__(self, format_version: _Optional[int] = ..., model: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., quality: _Optional[float] = ..., total_bytes: _Optional[int] = ..., decodable: _Optional[bool] = ..., sections: _Optional[_Iterable[_Union[Section, _Mapping]]] = ..., grey: _Optional[bool] = ..., lossless: _Optional[bool] = ...) -> None: ...

class Section(_message.Message):
    __slots__ = ("kind", "length", "crc32")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    kind: int
    length: int
    crc32: int
    def __init__(self, kind: _Optional[int] = ..., length: _Optional[int] = ..., crc32: _Optional[int] = ...) -> None: ...
