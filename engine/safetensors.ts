import type { SafetensorsHeader, TensorInfo } from '../nano-param-decomp.ts';
import { refuse } from './usage-error.ts';

// The header of a safetensors file from a stranger: what two readers could read differently (a key that comes twice, a
// hole between two tensors) is refused, and nothing in it can make the reader crash or allocate without bounds.

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
  const { __metadata__: metadata = {}, ...entries } = header;
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
    if (shape.reduce((n, d) => n * d, 1) * dtypeBytes(dtype) !== end - begin)
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
