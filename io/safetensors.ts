import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import { standIn } from './stand-in.ts';
import { refuse, UsageError } from './usage-error.ts';

// Safetensors files: the length of the header in 8 bytes, the header (JSON), then the tensors' bytes side by side. Those
// from strangers are read with care: what two readers could read differently (a key that comes twice, a hole between two
// tensors) is refused, and nothing in a header can make the reader crash or allocate without bounds.

export type TensorInfo = { dtype: string; shape: readonly number[]; begin: number; end: number }; // bytes of the file
type SafetensorsHeader = { tensors: ReadonlyMap<string, TensorInfo>; metadata: ReadonlyMap<string, string> };

/** The number behind 16 bits: a sign, 5 bits of exponent (0: subnormal, 31: infinity and NaN), 10 bits of mantissa. */
const HALF_FLOATS = Float32Array.from({ length: 65536 }, (_, bits) => {
  const [sign, exponent, mantissa] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (exponent ? (1024 + mantissa) * 2 ** (exponent - 25) : mantissa * 2 ** -24);
});
/** By dtype: the numbers in a tensor's bytes. */
const DECODERS: Readonly<Record<string, (bytes: ArrayBuffer) => ArrayLike<number>>> = {
  F32: bytes => new Float32Array(bytes),
  F16: bytes => new Float32Array(new Uint16Array(bytes)).map(bits => HALF_FLOATS[bits]!),
  BF16: bytes => new Float32Array(new Uint32Array(new Uint16Array(bytes)).map(upperHalf => upperHalf << 16).buffer),
  F64: bytes => new Float64Array(bytes),
};

const PIECE = 2 ** 22; // bytes, a multiple of every number's
const sizeOf = (shape: readonly number[]) => shape.reduce((n, d) => n * d, 1);

const DTYPES = 'BOOL U8 I8 F8_E5M2 F8_E4M3 U16 I16 F16 BF16 U32 I32 F32 U64 I64 F64 C64'.split(' ');
const dtypeBytes = (dtype: string) => Number(/\d+/.exec(dtype)?.[0] ?? 8) / 8; // BOOL takes a byte
const isSizes = (x: unknown): x is number[] => Array.isArray(x) && x.every(n => Number.isSafeInteger(n) && n >= 0);

/** JSON.parse, stricter: keys that come twice (it would keep the last), lone surrogates and 1.0 or 1e3 throw. */
function parseStrictJson(text: string): unknown {
  const value = JSON.parse(text);
  const openObjects: Set<string>[] = []; // the keys of each
  for (const [token] of text.matchAll(/"[^"\\]*(?:\\.[^"\\]*)*"(?:\s*:)?|[{}]|-?\d[\d.eE+-]*/g)) {
    if (token === '{') openObjects.push(new Set());
    else if (token === '}') openObjects.pop();
    else if (token.startsWith('"')) {
      const string: string = JSON.parse(token.slice(0, token.lastIndexOf('"') + 1));
      const keys = token.endsWith(':') ? openObjects.at(-1) : undefined;
      if (/\p{Cs}/u.test(string)) throw new Error(`"${string}" has half a surrogate pair`);
      if (keys?.has(string)) throw new Error(`the key "${string}" comes twice`);
      keys?.add(string);
    } else if (!/^\d+$/.test(token)) throw new Error(`${token} is not a plain whole number`);
  }
  return value;
}

/**
 * Trusts nothing: lengths are checked before anything is allocated from them, and the tensors must cover the data.
 * @param read the file's bytes from begin to end
 * @throws UsageError naming the file and what is wrong with it
 */
export function readHeader(
  file: string,
  read: (begin: number, end: number) => Uint8Array,
  fileBytes: number,
): SafetensorsHeader {
  const headerBytes = Number(new DataView(read(0, 8).buffer).getBigUint64(0, true));
  const dataBegin = 8 + headerBytes;
  if (headerBytes > 100e6 || dataBegin > fileBytes)
    refuse(`${file}: header of ${headerBytes} bytes; at most 100 MB within the file's ${fileBytes} are read`);
  const bytes = read(8, dataBegin);
  let header: Record<string, { dtype?: string; shape?: unknown; data_offsets?: unknown } | null>;
  try {
    if (bytes[0] !== 0x7b) throw new Error("it must start with '{'");
    header = parseStrictJson(new TextDecoder('utf-8', { fatal: true }).decode(bytes)) as typeof header;
  } catch (error) {
    refuse(`${file}: the header is not strict JSON in UTF-8: ${(error as Error).message}`);
  }
  const { __metadata__, ...entries } = header;
  const metadata: unknown = __metadata__ ?? {}; // null is none, as in the Rust library
  const texts: unknown[] = metadata && !Array.isArray(metadata) ? Object.values(metadata) : [metadata];
  if (typeof metadata !== 'object' || texts.some(text => typeof text !== 'string'))
    refuse(`${file}: __metadata__ is not an object of strings`);

  const tensors = new Map<string, TensorInfo>(); // to a Map no name is special, not even __proto__
  for (const [name, entry] of Object.entries(entries)) {
    const { dtype, shape, data_offsets: offsets, ...others } = entry ?? {};
    const tensor = `tensor "${name.slice(0, 80)}"`;
    if (!dtype || !DTYPES.includes(dtype)) refuse(`${file}: ${tensor}: its dtype is none of ${DTYPES}`);
    if (!isSizes(shape) || !isSizes(offsets) || offsets.length !== 2 || Object.keys(others).length)
      refuse(`${file}: ${tensor} takes dtype, shape and two data_offsets, all whole numbers, and nothing else`);
    const [begin, end] = offsets as [number, number];
    if (sizeOf(shape) * dtypeBytes(dtype) !== end - begin)
      refuse(`${file}: ${tensor}: bytes ${begin} to ${end} are not what ${dtype} of shape [${shape}] takes`);
    tensors.set(name, { dtype, shape, begin: dataBegin + begin, end: dataBegin + end });
  }
  let covered = dataBegin;
  for (const { begin, end } of [...tensors.values()].sort((a, b) => a.begin - b.begin || a.end - b.end)) {
    if (begin !== covered) refuse(`${file}: overlap or hole at byte ${covered}; tensors must lie side by side`);
    covered = end;
  }
  if (covered !== fileBytes) refuse(`${file}: tensors end at byte ${covered}, not with the file at ${fileBytes}`);
  return { tensors, metadata: new Map(Object.entries(metadata as Record<string, string>)) };
}

/** Opens a safetensors file, its header checked; tensors are read one at a time, in row-major order. */
export async function openSafetensors(file: string) {
  const stat = fs.statSync(file, { throwIfNoEntry: false });
  if (!stat?.isFile()) refuse(`${file}: is not a file; a .safetensors file is expected here`);
  const fd = fs.openSync(file, 'r');
  const close = () => fs.closeSync(fd);
  const read = (begin: number, end: number): Uint8Array<ArrayBuffer> => {
    const bytes = new Uint8Array(end - begin);
    for (let done = 0, n = 0; done < bytes.length; done += n) {
      n = fs.readSync(fd, bytes, done, bytes.length - done, begin + done);
      if (n === 0) refuse(`${file}: ends too early for a safetensors file`);
    }
    return bytes;
  };
  let header: SafetensorsHeader;
  try {
    header = readHeader(file, read, stat.size);
  } catch (error) {
    close();
    const instead = standIn(file);
    throw instead ? new UsageError(`${file}: ${instead}`) : error;
  }
  const readFloat32 = (name: string): Float32Array => {
    const { dtype, shape, begin, end } = header.tensors.get(name) ?? refuse(`${file}: has no tensor "${name}"`);
    const no = () => refuse(`${file}: "${name}" is ${dtype}; ${Object.keys(DECODERS)} can be read here`);
    const [decode, out] = [DECODERS[dtype] ?? no(), new Float32Array(sizeOf(shape))];
    for (let from = begin, at = 0; from < end; from += PIECE) {
      const values = decode(read(from, Math.min(from + PIECE, end)).buffer); // pieces: never a second copy of it all
      out.set(values, at);
      at += values.length;
    }
    return out;
  };
  return { ...header, readFloat32, close };
}

/** Several files as one: the shards of a model. */
export async function openShards(files: readonly string[]) {
  const shards: Awaited<ReturnType<typeof openSafetensors>>[] = [];
  const close = () => {
    for (const shard of shards) shard.close();
  };
  try {
    for (const file of files) shards.push(await openSafetensors(file));
  } catch (error) {
    close();
    throw error;
  }
  const tensors = new Map(shards.flatMap(shard => [...shard.tensors]));
  const holder = new Map(shards.flatMap(shard => [...shard.tensors.keys()].map(name => [name, shard] as const)));
  return { tensors, readFloat32: (name: string) => holder.get(name)!.readFloat32(name), close };
}

export interface TensorToWrite {
  name: string;
  shape: readonly number[];
  data: Float32Array | (() => Float32Array | Promise<Float32Array>); // a function is called when the tensor's turn comes
}

/** Returns the file's SHA-256. Under its own name it is always whole: written beside, put on disk, then renamed. */
export async function writeSafetensors(
  file: string,
  tensors: Iterable<TensorToWrite>,
  metadata: Readonly<Record<string, string>> = {},
): Promise<string> {
  const list = [...tensors];
  const header: Record<string, unknown> = Object.assign(Object.create(null), { __metadata__: metadata });
  let end = 0;
  for (const { name, shape } of list) {
    if (name in header) throw new Error(`${file}: two tensors have the name ${name}`);
    header[name] = { dtype: 'F32', shape, data_offsets: [end, end + 4 * sizeOf(shape)] };
    end += 4 * sizeOf(shape);
  }
  const json = Buffer.from(JSON.stringify(header));
  const start = Buffer.concat([Buffer.alloc(8), json, Buffer.alloc(-json.length & 7, ' ')]); // so the data is aligned
  start.writeBigUInt64LE(BigInt(start.length - 8));

  const hash = crypto.createHash('sha256');
  const beside = `${file}.tmp-${process.pid}`;
  const fd = fs.openSync(beside, 'w');
  const write = (bytes: Uint8Array) => {
    for (let done = 0, n = 0; done < bytes.length; done += n) {
      n = fs.writeSync(fd, bytes, done, Math.min(bytes.length - done, 2 ** 30));
      hash.update(bytes.subarray(done, done + n));
    }
  };
  try {
    write(start);
    for (const { name, shape, data } of list) {
      const values = typeof data === 'function' ? await data() : data;
      if (values.length !== sizeOf(shape)) throw new Error(`${file}: the data of ${name} is not of shape [${shape}]`);
      write(new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
    }
    fs.fsyncSync(fd);
    fs.renameSync(beside, file);
  } finally {
    fs.closeSync(fd);
    fs.rmSync(beside, { force: true }); // after the rename there is nothing to remove
  }
  return hash.digest('hex');
}
