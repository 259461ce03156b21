import * as fs from 'node:fs';
import * as path from 'node:path';
import * as zlib from 'node:zlib';
import type { Tokenizer } from '@huggingface/tokenizers';
import { datasetShards } from './hub.ts';
import { orRefuse, refuse, UsageError } from './usage-error.ts';

// From files and data sets of the Hub to rows of tokens. Every reader holds one document (a line, a row, a parquet row
// group) in memory, never the file.

/** Rows of tokens, all of the same length. */
interface Rows {
  readonly count: number;
  readonly seqLen: number;
  row(i: number): Int32Array;
}

/** The documents of a file or of a Hub data set (`org/name[@revision]`): texts, or token ids where it has those. */
export async function* documents(source: string): AsyncGenerator<string | number[]> {
  const isFile = fs.existsSync(source);
  const [, type] = /\.(txt|jsonl|json|parquet)$/.exec(source) ?? [];
  if (!isFile && type) throw new UsageError(`${source}: no such file`);
  if (isFile && !type) throw new UsageError(`${source}: takes .txt, .jsonl, .json or .parquet`);
  if (isFile && !fs.statSync(source).isFile()) refuse(`${source}: is not a file`);
  if (!isFile) for await (const shard of datasetShards(source)) yield* parquetDocuments(shard);
  else if (type === 'parquet') yield* parquetDocuments(source);
  else if (type === 'json') yield* jsonRows(source);
  else if (type === 'jsonl') yield* jsonLines(source);
  else yield* textDocuments(source);
}

/** The text of a file, split at `separator` (one character), which the last piece has not behind it. */
async function* pieces(file: string, separator: RegExp): AsyncGenerator<string> {
  const decoder = new TextDecoder('utf-8', { fatal: true }); // which also drops a byte order mark
  let rest = '';
  const add = (bytes?: Uint8Array) => {
    try {
      return decoder.decode(bytes, { stream: bytes !== undefined });
    } catch {
      throw new UsageError(`${file}: is not UTF-8`);
    }
  };
  for await (const chunk of fs.createReadStream(file, { highWaterMark: 1 << 20 })) {
    const [first = '', ...others] = add(chunk).split(separator);
    rest += first;
    for (const other of others) {
      yield rest;
      rest = other;
    }
  }
  yield rest + add();
}

/** Blank lines separate the documents if the first megabyte has one between two texts, else each line is one. */
async function* textDocuments(file: string): AsyncGenerator<string> {
  const head = fs.createReadStream(file, { encoding: 'utf8', end: 1 << 20 });
  let start = '';
  for await (const chunk of head) start += chunk;
  const blankLines = /\S[^\S\n]*\n[^\S\n]*\n\s*\S/.test(start);
  let paragraph: string[] = [];
  for await (const line of pieces(file, /\n/)) {
    const isBlank = line.trim() === '';
    if (!isBlank) paragraph.push(line);
    if ((isBlank || !blankLines) && paragraph.length > 0) {
      yield paragraph.join('\n').trim();
      paragraph = [];
    }
  }
  if (paragraph.length > 0) yield paragraph.join('\n').trim();
}

/** {"text": …} or {"input_ids": […]} a line. */
async function* jsonLines(file: string): AsyncGenerator<string | number[]> {
  let number = 0;
  for await (const line of pieces(file, /\n/)) {
    number++;
    if (line.trim() === '') continue;
    const record: { text?: unknown; input_ids?: unknown } | null = orRefuse(`${file}:${number}`, () =>
      JSON.parse(line),
    );
    const document = record?.text ?? record?.input_ids;
    if (typeof document !== 'string' && !Array.isArray(document))
      throw new UsageError(`${file}:${number}: takes {"text": …} or {"input_ids": […]}`);
    yield document;
  }
}

/** [[ids…], …]: rows hold numbers only, so every `]` ends one (JSON.parse can't take more than half a gigabyte). */
async function* jsonRows(file: string): AsyncGenerator<number[]> {
  let row = 0;
  let ended = false;
  let open: string | undefined; // the piece before, which a ] has closed when the next one comes
  for await (const piece of pieces(file, /\]/)) {
    const [closed, first] = [open, row === 0];
    open = piece;
    if (closed === undefined) continue;
    const [, ids] = (first ? /^\s*\[\s*\[([\d\s,]*)$/ : /^\s*,\s*\[([\d\s,]*)$/).exec(closed) ?? [];
    if (ids === undefined && (first || ended || closed.trim() !== ''))
      throw new UsageError(`${file}: row ${row}: takes [[ids…], …]`);
    if (ids === undefined) ended = true;
    else yield orRefuse(`${file}: row ${row++}`, () => JSON.parse(`[${ids}]`));
  }
  if (!ended || open?.trim()) throw new UsageError(`${file}: takes [[ids…], …], and this is not all of it`);
}

const COLUMNS = ['input_ids', 'text', 'story']; // the last is SimpleStories'

/** One row group after the other. */
async function* parquetDocuments(file: string): AsyncGenerator<string | number[]> {
  const { asyncBufferFromFile, parquetMetadataAsync, parquetReadObjects, parquetSchema } = await import(
    'hyparquet'
  ).catch(() => {
    throw new UsageError(`${file}: reading parquet needs the package hyparquet (npm install hyparquet)`);
  });
  const { zstdDecompressSync } = zlib as { zstdDecompressSync?: (bytes: Uint8Array) => Uint8Array }; // Node 22.15
  const compressors = {
    GZIP: (bytes: Uint8Array) => zlib.gunzipSync(bytes),
    BROTLI: (bytes: Uint8Array) => zlib.brotliDecompressSync(bytes),
    ...(zstdDecompressSync && { ZSTD: (bytes: Uint8Array) => zstdDecompressSync(bytes) }),
  };
  try {
    const buffer = await asyncBufferFromFile(file);
    const metadata = await parquetMetadataAsync(buffer);
    const names = parquetSchema(metadata).children.map(child => child.element.name);
    const column = COLUMNS.find(name => names.includes(name));
    if (!column) throw new UsageError(`${file}: has columns ${names.join(', ')}; takes ${COLUMNS.join(' or ')}`);
    let rowStart = 0;
    for (const group of metadata.row_groups) {
      const rowEnd = rowStart + Number(group.num_rows);
      const rows = await parquetReadObjects({
        file: buffer,
        metadata,
        columns: [column],
        rowStart,
        rowEnd,
        compressors,
      });
      for (const { [column]: value } of rows) {
        if (typeof value === 'string') yield value;
        else if (value !== null && value !== undefined) yield Array.from(value as ArrayLike<number | bigint>, Number);
      }
      rowStart = rowEnd;
    }
  } catch (error) {
    throw error instanceof UsageError ? error : new UsageError(`${file}: ${(error as Error).message}`);
  }
}

// ---- Rows ----

/** The training rows of a corpus, and those of its last documents, which are never trained on. */
interface Corpus {
  train: Rows;
  heldOut: Rows;
}

const HELD_OUT = 0.05;
const FEW_DOCUMENTS = 20; // of so few none is spared: then the last rows are held out

/** What the rows are made with and for. */
interface RowsOptions {
  seqLen: number; // but rows of a .json file are as long as they are
  tokenizer: Tokenizer | undefined;
  /** added behind every document, unless the tokenizer marks the border between documents by itself */
  endOfText: number | undefined;
  vocab: number;
  /** longest row, and what says so */
  context: number;
  contextField: string;
  /** for a corpus of more than `inMemory` bytes, or from the hub: the file of its tokens, and how many rows will be read */
  file: string;
  rows: number;
  inMemory?: number;
}

/**
 * Training rows of `data`, and the held-out ones: those of `evalData`, else of the last 5 % of the documents.
 * @throws UsageError naming the file, and the line or row where there is one
 */
export async function loadRows(data: string, evalData: string, options: RowsOptions): Promise<Corpus> {
  const held = evalData ? await openDocuments(evalData, options) : undefined;
  let heldOut = held && packRows(await collect(held.ids), held.seqLen);
  const { ids, seqLen } = await openDocuments(data, options);
  let train: Rows;
  if (fs.existsSync(data) && fs.statSync(data).size <= (options.inMemory ?? 2 ** 28)) {
    let texts = await collect(ids);
    if (!heldOut && texts.length < FEW_DOCUMENTS) {
      const rows = packRows(texts, seqLen);
      texts = Array.from({ length: rows.count }, (_, i) => [...rows.row(i)]);
    }
    heldOut ??= packRows(texts.splice(-Math.max(1, Math.round(texts.length * HELD_OUT))), seqLen);
    train = packRows(texts, seqLen);
  } else {
    const { file, rows, vocab } = options;
    fs.mkdirSync(path.dirname(file), { recursive: true });
    const corpus = await writeCorpus(file, ids, vocab, {
      seqLen,
      heldOutShare: heldOut ? 0 : HELD_OUT,
      enough: rows * seqLen * (1 + 2 * HELD_OUT),
    });
    heldOut ??= corpus.heldOut;
    train = corpus.train;
  }
  const { context, contextField } = options;
  for (const [name, { count, seqLen }] of [
    [data, train],
    [evalData || `${data}, held out`, heldOut],
  ] as const) {
    if (count < 1) refuse(`${name}: too short for one row of ${seqLen} tokens (--seq-len)`);
    const fits = seqLen >= 2 && seqLen <= context;
    if (!fits) refuse(`${name}: rows of ${seqLen} tokens; takes 2 to ${context} (the target's ${contextField})`);
  }
  return { train, heldOut };
}

/** The documents as checked ids, and the length of the rows. */
async function openDocuments(source: string, { tokenizer, endOfText, vocab, seqLen }: RowsOptions) {
  const isRows = source.endsWith('.json');
  // the first document is read here already: what can't be read is refused before anything is written
  for await (const first of documents(source)) {
    if (isRows) seqLen = first.length;
    break;
  }
  const marks = (tokenizer?.encode('').ids.length ?? 0) > 0; // it adds begin- or end-of-text by itself
  const mark = marks || endOfText === undefined ? [] : [endOfText];
  const idsOf = (document: string) =>
    tokenizer
      ? [...tokenizer.encode(document).ids, ...mark]
      : refuse(`${source}: the model has no tokenizer.json, so data must be ids`);
  async function* ids(): AsyncGenerator<number[]> {
    for await (const document of documents(source)) {
      const found = typeof document === 'string' ? idsOf(document) : document;
      const odd = found.find(id => !Number.isInteger(id) || id < 0 || id >= vocab);
      if (odd !== undefined) refuse(`${source}: ${odd} is no token id of the model (0 to ${vocab - 1})`);
      if (isRows && found.length !== seqLen) refuse(`${source}: a row has ${found.length} tokens, the first ${seqLen}`);
      yield found;
    }
  }
  return { ids: ids(), seqLen };
}

async function collect<X>(items: AsyncIterable<X>): Promise<X[]> {
  const all: X[] = [];
  for await (const item of items) all.push(item);
  return all;
}

/** Documents joined and cut into rows; an incomplete last row is left out. */
function packRows(texts: number[][], seqLen: number): Rows {
  const tokens = Int32Array.from(texts.flat());
  const row = (i: number) => tokens.subarray(i * seqLen, (i + 1) * seqLen);
  return { count: Math.floor(tokens.length / seqLen), seqLen, row };
}

// ---- A corpus in a file ----
// Tokens are written once and read by position: it may be larger than memory.

/**
 * Writes the documents, one after the other, to `file` (16 bits a token where the vocabulary allows) and gives its rows.
 * Stops when it has `enough` tokens, that is as many as the run will see.
 */
export async function writeCorpus(
  file: string,
  texts: AsyncIterable<readonly number[]>,
  vocab: number,
  options: { seqLen: number; heldOutShare: number; enough?: number },
): Promise<Corpus> {
  const { seqLen, heldOutShare, enough = Infinity } = options;
  const Ids = vocab <= 1 << 16 ? Uint16Array : Uint32Array;
  const beside = `${file}.${process.pid}`;
  const out = fs.openSync(beside, 'w');
  const ends: number[] = []; // of every document; 8 bytes each, next to nothing beside its tokens
  try {
    let end = 0;
    for await (const ids of texts) {
      fs.writeSync(out, Ids.from(ids));
      end += ids.length;
      ends.push(end);
      if (end >= enough) break;
    }
  } finally {
    fs.closeSync(out);
  }
  fs.renameSync(beside, file);
  // one long text has no last 5 % of documents: then of its tokens
  const total = ends.at(-1) ?? 0;
  const kept = Math.ceil(ends.length * heldOutShare);
  const border =
    ends.length < FEW_DOCUMENTS ? Math.floor(total * (1 - heldOutShare)) : (ends[ends.length - kept - 1] ?? 0);
  return { train: openRows(file, Ids, seqLen, 0, border), heldOut: openRows(file, Ids, seqLen, border, total) };
}

function openRows(
  file: string,
  Ids: typeof Uint16Array | typeof Uint32Array,
  seqLen: number,
  from: number,
  to: number,
): Rows {
  const fd = fs.openSync(file, 'r');
  const count = Math.floor((to - from) / seqLen);
  const row = (i: number) => {
    const ids = new Ids(seqLen);
    const got = fs.readSync(fd, ids, 0, ids.byteLength, (from + i * seqLen) * Ids.BYTES_PER_ELEMENT);
    if (got !== ids.byteLength) throw new Error(`${file}: row ${i} is cut off`);
    return Int32Array.from(ids);
  };
  return { count, seqLen, row };
}
