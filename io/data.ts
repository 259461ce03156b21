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

// ---- Documents ----
// One rule for all readers. A text's line ends become \n. A document that has nothing in it (blank, null, no ids, or only
// the tokenizer's end-of-text) is skipped. What a record holds is decided by the first of these fields that it has:
const FIELDS = ['input_ids', 'text', 'story']; // ids that were made from the text beside them; the last is SimpleStories'
const TAKES = 'takes {"text": …} or {"input_ids": […]}';

/** Token ids of a record that can't be, 1.5 or null, are found where the vocabulary is known. */
type Document = string | number[];

/** What the reader of a source has to know about the model. */
interface Reading {
  /** texts that mark a text's end: alone in a line of a .txt file they separate its documents */
  marks: readonly string[];
  /** ids that stand for nothing, and for a text's end: of the former, runs at either end of a row are left out */
  pad?: number | undefined;
  endOfText?: number | undefined;
  say: (warning: string) => void;
  /** hears at which commit of the Hub a data set is read */
  hearCommit?: (commit: string) => void;
}
const END_OF_TEXT = '<|endoftext|>';
const speak = (warning: string) => void process.stderr.write(`warning  ${warning}\n`);
const PLAIN: Reading = { marks: [END_OF_TEXT], say: speak };

/**
 * The documents of a file or of a Hub data set (`org/name[@revision]`): texts, or token ids where it has those.
 * @throws UsageError naming the file, and the line or row where there is one
 */
export async function* documents(source: string, reading: Reading = PLAIN): AsyncGenerator<Document> {
  const said = new Set<string>();
  const say = (warning: string) => {
    if (!said.has(warning)) reading.say(`${source}: ${warning}`);
    said.add(warning);
  };
  const watch = watchForPadding(say);
  try {
    for await (const { where, record } of records(source, reading)) {
      const document = documentOf(where, record, { ...reading, say });
      if (document.length === 0 && !Array.isArray(record)) continue;
      const masked = 'attention_mask' in record && record.attention_mask;
      if (typeof document !== 'string' && !masked) watch.see(document);
      yield document;
    }
  } catch (error) {
    if (error instanceof RangeError && error.message === 'Invalid string length')
      refuse(`${source}: a document is longer than a string can be (512 MB); separate its parts by blank lines`);
    throw error;
  }
  watch.end();
}

/** A row of a .json file is the ids alone. */
type Fields = Record<string, unknown> | number[];

async function* records(source: string, reading: Reading): AsyncGenerator<{ where: string; record: Fields }> {
  const isFile = fs.existsSync(source);
  const [, type] = /\.(txt|jsonl|json|parquet)$/.exec(source) ?? [];
  if (!isFile && type) throw new UsageError(`${source}: no such file`);
  if (isFile && !type) throw new UsageError(`${source}: takes .txt, .jsonl, .json or .parquet`);
  if (isFile && !fs.statSync(source).isFile()) refuse(`${source}: is not a file`);
  if (!isFile)
    for await (const shard of datasetShards(source)) {
      const [, commit] = /[\\/]snapshots[\\/]([0-9a-f]{40})[\\/]/.exec(shard) ?? [];
      if (commit) reading.hearCommit?.(commit);
      yield* parquetRecords(shard);
    }
  else if (type === 'parquet') yield* parquetRecords(source);
  else if (type === 'json') for await (const record of jsonRows(source)) yield { where: source, record };
  else if (type === 'jsonl') yield* jsonLines(source);
  else for await (const text of textDocuments(source, reading.marks)) yield { where: source, record: { text } };
}

/** A text with \n as its line ends, or ids without padding; empty for what is to be skipped. @throws UsageError */
function documentOf(where: string, record: Fields, reading: Reading): Document {
  if (Array.isArray(record)) return record;
  const field = FIELDS.find(name => name in record);
  if (field === undefined)
    return refuse(`${where}: ${TAKES}, and this has ${Object.keys(record).join(', ') || 'nothing'}`);
  const value = record[field];
  if (value === null || value === undefined) return [];
  if (field === 'input_ids') {
    const ids = listOf(where, field, value).map(Number);
    if (record.attention_mask === null || record.attention_mask === undefined)
      return withoutPadding(ids, record.labels, reading);
    const mask = listOf(where, 'attention_mask', record.attention_mask);
    if (mask.length !== ids.length)
      refuse(`${where}: has ${ids.length} input_ids, and an attention_mask of ${mask.length}`);
    return ids.filter((_, i) => Number(mask[i]) !== 0);
  }
  if (typeof value !== 'string') return refuse(`${where}: ${field} is ${kindOf(value)}; takes a string`);
  const text = value.replace(/\r\n?/g, '\n');
  const bare = text.trim();
  return reading.marks.includes(bare) || bare === '' ? '' : text;
}

/** A list of numbers (or of true and false). */
function listOf(where: string, field: string, value: unknown): (number | bigint | boolean)[] {
  const isList = Array.isArray(value) || ArrayBuffer.isView(value);
  const list = isList ? Array.from(value as ArrayLike<unknown>) : undefined;
  const odd = list?.find(entry => !['number', 'bigint', 'boolean'].includes(typeof entry));
  if (!list || (odd !== undefined && odd !== null))
    return refuse(`${where}: ${field} is ${kindOf(list ? [odd] : value)}; takes a list of numbers`);
  return list.map(entry => (entry ?? Number.NaN) as number);
}

function kindOf(value: unknown): string {
  const word = (one: unknown) => (Array.isArray(one) ? 'list' : typeof one);
  if (Array.isArray(value)) return value.length > 0 ? `a list of ${word(value[0])}s` : 'an empty list';
  return typeof value === 'object' ? 'an object' : `a ${typeof value}`;
}

/**
 * Ids of a row without attention_mask. Padding is a run of one id at an end of the row, if that id is the model's
 * pad_token_id, or if all of the run's labels are -100 (at the row's end only: in front such labels stand for a
 * prompt). Where padding and end-of-text are the same id, one of them stays. Other labels are not read.
 */
function withoutPadding(ids: number[], labels: unknown, { pad, endOfText, say }: Reading): number[] {
  const ignored = (i: number) => Array.isArray(labels) && labels.length === ids.length && Number(labels[i]) === -100;
  let [from, to] = [0, ids.length];
  const last = ids.at(-1);
  while (to > 0 && ids[to - 1] === last && (last === pad || ignored(to - 1))) to--;
  while (from < to && ids[from] === pad) from++;
  if (to < ids.length && last === endOfText) to++;
  if (from > 0 && pad === endOfText) from--;
  const kept = ids.slice(from, to);
  if (to < ids.length && last !== pad)
    say(`token ${last} at the end of rows, with labels of -100, is left out as padding`);
  else if (kept.length < ids.length) say(`token ${pad} at the ends of rows, the pad_token_id, is left out`);
  if (kept.some((_, i) => ignored(from + i)))
    say('labels are not read: positions with -100 inside rows are trained on like the others');
  return kept;
}

/** Says so if most rows end in the same id again and again: nobody said that it is padding, so it is kept. */
function watchForPadding(say: (warning: string) => void) {
  const RUN = 4;
  const ENOUGH = 64; // rows to judge by
  const endings = new Map<number, number>();
  let rows = 0;
  const end = () => {
    const [id, count] = [...endings].sort((a, b) => b[1] - a[1])[0] ?? [0, 0];
    if (rows > 1 && count > rows / 2)
      say(
        `most rows end in a run of token ${id}: if that is padding, it is trained on; an attention_mask leaves it out`,
      );
  };
  return {
    see(ids: readonly number[]): void {
      const last = ids.at(-1);
      if (rows++ < ENOUGH && last !== undefined && ids.length > RUN && ids.slice(-RUN).every(id => id === last))
        endings.set(last, (endings.get(last) ?? 0) + 1);
      if (rows === ENOUGH) end();
    },
    end: () => (rows < ENOUGH ? end() : undefined),
  };
}

/** The text of a file, split at `separator`, which the last piece has not behind it; \r\n is never torn apart. */
async function* pieces(file: string, separator: RegExp): AsyncGenerator<string> {
  const decoder = new TextDecoder('utf-8', { fatal: true }); // which also drops a byte order mark
  let rest = '';
  let held = ''; // a \r, until it is known what follows
  const add = (bytes?: Uint8Array) => {
    try {
      return decoder.decode(bytes, { stream: bytes !== undefined });
    } catch {
      throw new UsageError(`${file}: is not UTF-8`);
    }
  };
  for await (const chunk of fs.createReadStream(file, { highWaterMark: 1 << 20 })) {
    const text = held + add(chunk);
    held = text.endsWith('\r') ? '\r' : '';
    const [first = '', ...others] = (held ? text.slice(0, -1) : text).split(separator);
    rest += first;
    for (const other of others) {
      yield rest;
      rest = other;
    }
  }
  const [first = '', ...others] = (held + add()).split(separator);
  yield rest + first;
  yield* others;
}

/** Lines that end in \n, \r\n or \r. */
const lines = (file: string) => pieces(file, /\r\n|\n|\r/);

/**
 * A line that is only an end-of-text mark ends a document. If the first 64 MB have one, nothing else does; else blank
 * lines separate the documents, if the first megabyte has one between two texts; else each line is a document.
 */
async function* textDocuments(file: string, marks: readonly string[]): AsyncGenerator<string> {
  const isMark = (line: string) => marks.includes(line.trim());
  let [marked, blankLines, wasBlank, seen] = [false, false, false, 0];
  let before = false; // is there a text before?
  for await (const line of lines(file)) {
    marked = isMark(line);
    seen += line.length + 1;
    if (marked || seen > 1 << 26) break;
    const isBlank = line.trim() === '';
    if (before && wasBlank && !isBlank && seen <= 1 << 20) blankLines = true;
    before ||= !isBlank;
    wasBlank = isBlank;
  }
  let paragraph: string[] = [];
  for await (const line of lines(file)) {
    const isBlank = line.trim() === '';
    const separates = isMark(line) || (isBlank && !marked);
    if (!separates && (!isBlank || paragraph.length > 0)) paragraph.push(line);
    if ((separates || (!marked && !blankLines)) && paragraph.length > 0) {
      yield paragraph.join('\n').trim();
      paragraph = [];
    }
  }
  if (paragraph.length > 0) yield paragraph.join('\n').trim();
}

/** A record a line. */
async function* jsonLines(file: string): AsyncGenerator<{ where: string; record: Record<string, unknown> }> {
  let number = 0;
  for await (const line of lines(file)) {
    const where = `${file}:${++number}`;
    if (line.trim() === '') continue;
    const record: unknown = orRefuse(where, () => JSON.parse(line));
    if (typeof record !== 'object' || record === null || Array.isArray(record)) refuse(`${where}: ${TAKES}`);
    yield { where, record: record as Record<string, unknown> };
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

// biome-ignore lint/suspicious/noExplicitAny: a node of hyparquet's schema, and its element as in the format's specification
type Column = { element: any; children: Column[] };

/** A column's type in words: string, int64, list of double, struct {raw, lang}. */
function typeOf({ element, children }: Column): string {
  const inner = children[0]?.children[0] ?? children[0];
  if (element.converted_type === 'LIST' && inner) return `list of ${typeOf(inner)}`;
  if (children.length > 0) return `struct {${children.map(child => child.element.name).join(', ')}}`;
  const isText = element.type === 'BYTE_ARRAY'; // large, dictionary and binary ones too: read as UTF-8
  const type = isText ? 'string' : String(element.type).toLowerCase();
  return element.repetition_type === 'REPEATED' ? `list of ${type}` : type;
}

/** One row group after the other. */
async function* parquetRecords(file: string): AsyncGenerator<{ where: string; record: Record<string, unknown> }> {
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
  const readable = ['UNCOMPRESSED', 'SNAPPY', ...Object.keys(compressors)];
  try {
    const buffer = await asyncBufferFromFile(file);
    const metadata = await parquetMetadataAsync(buffer);
    const all: Column[] = parquetSchema(metadata).children;
    const find = (name: string) => all.find(column => column.element.name === name);
    const field = FIELDS.find(find);
    if (!field) {
      const names = all.map(column => column.element.name).join(', ');
      throw new UsageError(`${file}: has columns ${names}; takes ${FIELDS.join(' or ')}`);
    }
    const columns = [field, ...(field === 'input_ids' ? ['attention_mask', 'labels'].filter(find) : [])];
    for (const name of columns) {
      const type = typeOf(find(name)!);
      const [fits, takes] =
        name === 'text' || name === 'story'
          ? [type === 'string', 'string']
          : [/^list of (int(32|64)|boolean)$/.test(type), 'list of int32 or int64'];
      if (!fits && name !== 'labels') refuse(`${file}: column ${name} is a ${type}; takes ${takes}`);
    }
    const chunks = metadata.row_groups.flatMap(group => group.columns.map(column => column.meta_data));
    const odd = chunks.find(c => c && columns.includes(c.path_in_schema[0]!) && !readable.includes(c.codec));
    if (odd?.codec === 'ZSTD')
      refuse(`${file}: is compressed with ZSTD, which Node 22.15 and later reads; this is ${process.version}`);
    if (odd) refuse(`${file}: is compressed with ${odd.codec}; takes ${readable.join(', ').toLowerCase()} or zstd`);
    let rowStart = 0;
    for (const group of metadata.row_groups) {
      const rowEnd = rowStart + Number(group.num_rows);
      const rows = await parquetReadObjects({ file: buffer, metadata, columns, rowStart, rowEnd, compressors });
      for (const [i, record] of rows.entries()) yield { where: `${file}: row ${rowStart + i}`, record };
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
  /** the Hub's commits of the two data sets, where they come from there */
  commit?: string;
  evalCommit?: string;
}

const HELD_OUT = 0.05;
const FEW_DOCUMENTS = 20; // of so few none is spared: then the last rows are held out

/** What the rows are made with and for. */
interface RowsOptions {
  seqLen: number; // but rows of a .json file are as long as they are
  tokenizer: Tokenizer | undefined;
  /**
   * The config's eos_token_id, which is added behind every document, unless the tokenizer marks the border between
   * documents by itself. One that is missing or no token is not added, with a warning.
   */
  endOfText: number | undefined;
  /** the config's pad_token_id, if it has one */
  pad?: number | undefined;
  vocab: number;
  /** longest row, and what says so */
  context: number;
  contextField: string;
  /** for a corpus of more than `inMemory` bytes, or from the hub: the file of its tokens, and how many rows will be read */
  file: string;
  rows: number;
  inMemory?: number;
  /** of such a corpus so much is read that so many rows are held out [1] */
  evalRows?: number;
  /** takes the lines of warnings [standard error] */
  say?: (warning: string) => void;
}

type RunConfig = Record<'data' | 'evalData' | 'out', string> &
  Record<'seqLen' | 'nSteps' | 'batchSize' | 'evalBatchSize', number>;
interface Model {
  arch: { vocab: number; context: number; contextField: string };
  config: Readonly<Record<string, unknown>>; // config.json
}
/** The rows of a run on a model: `loadRows` with what the two configs say. Llama 3 lists several ends of text. */
export function rowsOf(config: RunConfig, { arch, config: model }: Model, tokenizer: Tokenizer | undefined) {
  const id = (value: unknown) => (Number.isInteger(value) ? (value as number) : undefined);
  return loadRows(config.data, config.evalData, {
    ...arch,
    seqLen: config.seqLen,
    tokenizer,
    endOfText: id([model.eos_token_id].flat()[0]),
    pad: id(model.pad_token_id),
    file: path.join(config.out, 'tokens.bin'),
    rows: config.nSteps * config.batchSize,
    evalRows: config.evalBatchSize || config.batchSize,
  });
}

/**
 * Training rows of `data`, and the held-out ones: those of `evalData`, else of the last 5 % of the documents.
 * @throws UsageError naming the file, and the line or row where there is one
 */
export async function loadRows(data: string, evalData: string, options: RowsOptions): Promise<Corpus> {
  const held = evalData ? await openDocuments(evalData, options) : undefined;
  let heldOut = held && packRows(await collect(held.ids), held.seqLen);
  const opened = await openDocuments(data, options);
  const { ids, seqLen } = opened;
  let train: Rows;
  if (fs.existsSync(data) && fs.statSync(data).size <= (options.inMemory ?? 2 ** 28)) {
    let texts = await collect(ids);
    if (!heldOut && texts.length < FEW_DOCUMENTS) {
      const rows = packRows(texts, seqLen);
      texts = Array.from({ length: rows.count }, (_, i) => [...rows.row(i)]);
    }
    const lengths = texts.map(text => text.length);
    heldOut ??= packRows(texts.splice(-lastDocuments(lengths, HELD_OUT, seqLen, Math.round)), seqLen);
    train = packRows(texts, seqLen);
  } else {
    const { file, rows, vocab, evalRows = 1 } = options;
    fs.mkdirSync(path.dirname(file), { recursive: true });
    const corpus = await writeCorpus(file, ids, vocab, {
      seqLen,
      heldOutShare: heldOut ? 0 : HELD_OUT,
      enough: rows * seqLen * (1 + 2 * HELD_OUT),
      evalRows,
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
  const [commit, evalCommit] = [opened.commit(), held?.commit()];
  return { train, heldOut, ...(commit && { commit }), ...(evalCommit && { evalCommit }) };
}

/**
 * How many of the last documents are held out: a share of them, or so many more (up to half of all) as fill one row.
 * @param lengths of all documents, in tokens
 */
function lastDocuments(
  lengths: readonly number[],
  share: number,
  seqLen: number,
  round: (n: number) => number,
): number {
  let count = Math.max(1, round(lengths.length * share));
  let tokens = lengths.slice(-count).reduce((sum, length) => sum + length, 0);
  while (tokens < seqLen && count < lengths.length / 2) tokens += lengths.at(-++count)!;
  return count;
}

/** The id that is added behind each text, and what there is to say if there is none. */
function endMark({ tokenizer, endOfText, vocab }: RowsOptions): { mark?: number; warning?: string } {
  if ((tokenizer?.encode('').ids.length ?? 0) > 0) return {}; // it adds begin- or end-of-text by itself
  const without = 'documents are joined without a mark between them';
  if (endOfText === undefined) return { warning: `config.json has no eos_token_id: ${without}` };
  if (endOfText < 0 || endOfText >= vocab)
    return {
      warning: `config.json: eos_token_id ${endOfText} is no token of the model (0 to ${vocab - 1}); ${without}`,
    };
  if (tokenizer && tokenizer.id_to_token(endOfText) === undefined)
    return { warning: `config.json: eos_token_id ${endOfText} is no token of tokenizer.json; ${without}` };
  return { mark: endOfText };
}

/** The documents as checked ids, the length of the rows, and the Hub's commit as far as it is known. */
async function openDocuments(source: string, options: RowsOptions) {
  const { tokenizer, endOfText, pad, vocab, say = speak } = options;
  const isRows = source.endsWith('.json');
  const { mark, warning } = endMark(options);
  let commit: string | undefined;
  const hearCommit = (heard: string) => {
    commit ??= heard;
  };
  const name = endOfText === undefined ? undefined : tokenizer?.id_to_token(endOfText);
  const isSpecial = name !== undefined && tokenizer!.get_added_tokens_decoder().has(endOfText!);
  const marks = [END_OF_TEXT, ...(isSpecial ? [name.trim()] : [])];
  const all = documents(source, { marks, pad, endOfText, say, hearCommit });
  // the first document is read here already: what can't be read is refused before anything is written
  const first = await all.next();
  if (first.done) refuse(`${source}: has no documents, or only empty ones`);
  const seqLen = isRows ? first.value.length : options.seqLen;
  if (typeof first.value === 'string' && warning) say(warning);
  const idsOf = (text: string) => {
    const ids: number[] = tokenizer
      ? tokenizer.encode(text).ids
      : refuse(`${source}: the model has no tokenizer.json, so data must be ids`);
    return mark === undefined || ids.at(-1) === mark ? ids : [...ids, mark]; // some texts end in it already
  };
  async function* ids(): AsyncGenerator<number[]> {
    for (let next = first; !next.done; next = await all.next()) {
      const document = next.value;
      const found = typeof document === 'string' ? idsOf(document) : document;
      const odd = found.findIndex(id => !Number.isInteger(id) || id < 0 || id >= vocab);
      if (odd >= 0) refuse(`${source}: ${found[odd]} is no token id of the model (0 to ${vocab - 1})`);
      if (isRows && found.length !== seqLen) refuse(`${source}: a row has ${found.length} tokens, the first ${seqLen}`);
      if (found.length > 0) yield found;
    }
  }
  return { ids: ids(), seqLen, commit: () => commit };
}

async function collect<X>(items: AsyncIterable<X>): Promise<X[]> {
  const all: X[] = [];
  for await (const item of items) all.push(item);
  return all;
}

/** Documents joined and cut into rows; an incomplete last row is left out. */
function packRows(texts: number[][], seqLen: number): Rows {
  const tokens = new Int32Array(texts.reduce((sum, text) => sum + text.length, 0));
  let end = 0;
  for (const text of texts) {
    tokens.set(text, end);
    end += text.length;
  }
  const row = (i: number) => tokens.subarray(i * seqLen, (i + 1) * seqLen);
  return { count: Math.floor(tokens.length / seqLen), seqLen, row };
}

// ---- A corpus in a file ----
// Tokens are written once and read by position: it may be larger than memory.

/**
 * Writes the documents, one after the other, to `file` (16 bits a token where the vocabulary allows) and gives its rows.
 * Stops when it has `enough` tokens, that is as many as the run will see, and `evalRows` held-out rows.
 */
export async function writeCorpus(
  file: string,
  texts: AsyncIterable<readonly number[]>,
  vocab: number,
  options: { seqLen: number; heldOutShare: number; enough?: number; evalRows?: number },
): Promise<Corpus> {
  const { seqLen, heldOutShare, enough = Infinity, evalRows = 1 } = options;
  const Ids = vocab <= 1 << 16 ? Uint16Array : Uint32Array;
  const beside = `${file}.${process.pid}`;
  const out = fs.openSync(beside, 'w');
  const lengths: number[] = []; // of every document; 8 bytes each, next to nothing beside its tokens
  const few = () => lengths.length < FEW_DOCUMENTS; // one long text has no last 5 % of documents: then of its tokens
  let [total, held, kept] = [0, 0, 0]; // tokens, those of the last 5 % of the documents, and how many these are
  try {
    for await (const ids of texts) {
      fs.writeSync(out, Ids.from(ids));
      lengths.push(ids.length);
      total += ids.length;
      // the documents that are held out: the new one for the first of them, or one more
      held += ids.length;
      if (++kept > Math.ceil(lengths.length * heldOutShare)) held -= lengths.at(-kept--)!;
      const spare = few() ? total * heldOutShare : held;
      if (total >= enough && (heldOutShare === 0 || spare >= evalRows * seqLen)) break;
    }
  } finally {
    fs.closeSync(out);
  }
  fs.renameSync(beside, file);
  if (!few() && heldOutShare > 0) {
    const last = lengths.slice(-lastDocuments(lengths, heldOutShare, seqLen, Math.ceil));
    held = last.reduce((sum, length) => sum + length, 0);
  }
  const border = few() || heldOutShare === 0 ? Math.floor(total * (1 - heldOutShare)) : total - held;
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
