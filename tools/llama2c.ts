/**
 * Turns a checkpoint of llama2.c into a Hugging Face folder, which --model takes and `transformers` loads.
 *
 *   npx tsx tools/llama2c.ts --checkpoint stories260K.bin --tokenizer tok512.bin --out stories260K
 *
 * A. Checkpoints     .pt as its train.py saves, .bin with float32 weights (the legacy header, and version 1)
 * B. A .pt file      a zip archive of a pickle and of raw numbers; the pickle is read as data, nothing in it is run
 * C. Tokenizers      the .bin that its C program reads, or the sentencepiece .model (BPE) that this was made from
 * D. The folder      config.json, model.safetensors, tokenizer.json, tokenizer_config.json
 *
 * Left out: .bin of version 2 (int8), and what sentencepiece does to spaces before it tokenises, but for the one that
 * it puts in front: as the Llama tokenizers of the Hub, the folder's keeps runs of spaces.
 */
import * as fs from 'node:fs';
import * as path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { DECODERS, writeSafetensors } from '../io/safetensors.ts';
import { orRefuse, refuse } from '../io/usage-error.ts';

const USAGE = 'npx tsx tools/llama2c.ts --checkpoint FILE.pt|FILE.bin --tokenizer FILE.bin|FILE.model --out DIR';

// ---- A. Checkpoints -------------------------------------------------------------------------------------------------

/** What the format leaves out of its header; the C program has them as constants. */
const [NORM_EPS, ROPE_THETA] = [1e-5, 10_000];

interface Shape {
  dim: number;
  hiddenDim: number;
  nLayers: number;
  nHeads: number;
  nKvHeads: number;
  vocab: number;
  context: number;
  normEps: number;
}
/** `tensors` have llama2.c's names (layers.0.attention.wq.weight …), in PyTorch's layout [out,in]. */
export type Checkpoint = { shape: Shape; tied: boolean; tensors: Map<string, Float32Array> };

/** The tensors of a block: llama2.c's name, the Hub's, and the shape. */
const ofBlock = ({ dim, hiddenDim, nHeads, nKvHeads }: Shape): [own: string, hub: string, shape: number[]][] => {
  const kvDim = (dim / nHeads) * nKvHeads;
  return [
    ['attention_norm', 'input_layernorm', [dim]],
    ['attention.wq', 'self_attn.q_proj', [dim, dim]],
    ['attention.wk', 'self_attn.k_proj', [kvDim, dim]],
    ['attention.wv', 'self_attn.v_proj', [kvDim, dim]],
    ['attention.wo', 'self_attn.o_proj', [dim, dim]],
    ['ffn_norm', 'post_attention_layernorm', [dim]],
    ['feed_forward.w1', 'mlp.gate_proj', [hiddenDim, dim]],
    ['feed_forward.w2', 'mlp.down_proj', [dim, hiddenDim]],
    ['feed_forward.w3', 'mlp.up_proj', [hiddenDim, dim]],
  ];
};

const VERSION_1 = 0x616b3432; // "ak42" in ASCII
/** The order of the tensors in a .bin; those of a block are stored for all blocks, one kind after the other. */
const BIN_ORDER = {
  legacy: 'tok_embeddings attention_norm wq wk wv wo ffn_norm w1 w2 w3 norm rotary output',
  version1: 'attention_norm ffn_norm norm tok_embeddings wq wk wv wo w1 w2 w3 output',
};

function checkShape(file: string, shape: Shape): Shape {
  const { dim, nHeads, nKvHeads } = shape;
  for (const [name, n] of Object.entries(shape))
    if (name !== 'normEps' && !(Number.isInteger(n) && n >= 1 && n < 2 ** 24))
      refuse(`${file}: ${name} is ${n}: not a llama2.c checkpoint (its .pt, or its .bin with float32 weights)`);
  if (dim % (2 * nHeads) !== 0 || nHeads % nKvHeads !== 0)
    refuse(`${file}: a width of ${dim} is nothing for ${nHeads} heads and ${nKvHeads} key-value heads`);
  return shape;
}

/** A .bin with float32 weights. @throws UsageError for other versions, and where the size is not what the header says */
export function readBin(file: string): Checkpoint {
  const bytes = orRefuse(file, () => fs.readFileSync(file));
  if (bytes.length < 256) refuse(`${file}: ends too early for a llama2.c checkpoint`);
  const version = bytes.readUInt32LE(0) === VERSION_1 ? bytes.readInt32LE(4) : 0;
  if (version > 1) refuse(`${file}: is of version ${version} (int8); takes the legacy format and version 1 (float32)`);
  const at = version === 1 ? 8 : 0;
  const header = Array.from({ length: 7 }, (_, i) => bytes.readInt32LE(at + 4 * i));
  const [dim = 0, hiddenDim = 0, nLayers = 0, nHeads = 0, nKvHeads = 0, vocab = 0, context = 0] = header;
  const tied = version === 1 ? bytes[36] === 1 : vocab > 0; // the legacy header says it by the sign
  const sizes = { dim, hiddenDim, nLayers, nHeads, nKvHeads, vocab: Math.abs(vocab), context, normEps: NORM_EPS };
  const shape = checkShape(file, sizes);

  const tensors = new Map<string, Float32Array>();
  let offset = version === 1 ? 256 : 28;
  const take = (name: string, size: number) => {
    const end = offset + 4 * size;
    if (end > bytes.length) refuse(`${file}: ends too early, within ${name}`);
    tensors.set(name, new Float32Array(Uint8Array.from(bytes.subarray(offset, end)).buffer));
    offset = end;
  };
  const block = ofBlock(shape);
  for (const part of BIN_ORDER[version === 1 ? 'version1' : 'legacy'].split(' ')) {
    const own = block.find(([name]) => name === part || name.endsWith(`.${part}`));
    if (own) for (let i = 0; i < nLayers; i++) take(`layers.${i}.${own[0]}.weight`, sizeOf(own[2]));
    else if (part === 'norm') take('norm.weight', dim);
    else if (part === 'rotary')
      offset += (4 * context * dim) / nHeads; // cosines and sines, half a head each
    else if (part === 'tok_embeddings' || !tied) take(`${part}.weight`, shape.vocab * dim);
  }
  if (offset !== bytes.length) refuse(`${file}: has ${bytes.length} bytes, its header asks for ${offset}`);
  return { shape, tied, tensors };
}
const sizeOf = (shape: readonly number[]) => shape.reduce((n, d) => n * d, 1);

/** A .pt of llama2.c's train.py: model_args, and the model's tensors. @throws UsageError for any other file */
export function readPt(file: string): Checkpoint {
  const checkpoint = readPickledArchive(file);
  const part = (name: string): Map<unknown, unknown> => {
    const value = checkpoint instanceof Map ? checkpoint.get(name) : undefined;
    return value instanceof Map ? value : refuse(`${file}: has no "${name}"; takes what llama2.c's train.py saves`);
  };
  const args = part('model_args');
  const tensors = new Map<string, Float32Array>();
  const shapes = new Map<string, readonly number[]>();
  for (const [name, tensor] of part('model')) {
    if (!(tensor instanceof StoredTensor)) continue;
    const plain = `${name}`.replace(/^_orig_mod\./, ''); // which torch.compile puts in front
    tensors.set(plain, tensor.read());
    shapes.set(plain, tensor.shape);
  }
  const number = (name: string, standard?: number) => Number(args.get(name) ?? standard ?? Number.NaN);
  const nHeads = number('n_heads');
  const shape = checkShape(file, {
    dim: number('dim'),
    hiddenDim: shapes.get('layers.0.feed_forward.w1.weight')?.[0] ?? 0,
    nLayers: number('n_layers'),
    nHeads,
    nKvHeads: number('n_kv_heads', nHeads),
    vocab: shapes.get('tok_embeddings.weight')?.[0] ?? 0,
    context: number('max_seq_len'),
    normEps: number('norm_eps', NORM_EPS),
  });
  for (const [name, , size] of allTensors(shape))
    if (tensors.get(name)?.length !== sizeOf(size))
      refuse(`${file}: ${name} is of shape [${shapes.get(name) ?? 'none'}], [${size}] is expected`);
  const [embedding, output] = ['tok_embeddings.weight', 'output.weight'].map(name => tensors.get(name));
  const tied = !output || output.every((x, i) => x === embedding![i]);
  return { shape, tied, tensors };
}

/** Every tensor but the head: llama2.c's name, the Hub's, the shape. */
const allTensors = (shape: Shape): [own: string, hub: string, shape: number[]][] => [
  ['tok_embeddings.weight', 'model.embed_tokens.weight', [shape.vocab, shape.dim]],
  ...Array.from({ length: shape.nLayers }, (_, i) =>
    ofBlock(shape).map(([own, hub, size]): [string, string, number[]] => {
      return [`layers.${i}.${own}.weight`, `model.layers.${i}.${hub}.weight`, size];
    }),
  ).flat(),
  ['norm.weight', 'model.norm.weight', [shape.dim]],
];

/**
 * llama2.c rotates neighbours (0,1), (2,3) … of a head, the Hub's Llama its halves (0, h/2), (1, h/2 + 1) …: the rows of
 * q and k go from the first order into the second. W is [nHeads·headDim, dIn].
 */
export function halvesFromPairs(W: Float32Array, nHeads: number, headDim: number): Float32Array {
  const dIn = W.length / (nHeads * headDim);
  const out = new Float32Array(W.length);
  for (let row = 0; row < nHeads * headDim; row++) {
    const inHead = row % headDim;
    const moved = row - inHead + (inHead % 2) * (headDim / 2) + Math.floor(inHead / 2);
    out.set(W.subarray(row * dIn, (row + 1) * dIn), moved * dIn);
  }
  return out;
}

// ---- B. A .pt file --------------------------------------------------------------------------------------------------

/** The stored files of a zip archive by name (PyTorch compresses none, and writes the 64-bit fields of large archives). */
function readZip(file: string, bytes: Buffer): Map<string, Buffer> {
  const no = (what: string) => refuse(`${file}: ${what}; takes a .pt as PyTorch 1.6 and later save it`);
  const end = bytes.lastIndexOf(Buffer.from('PK\x05\x06', 'latin1'));
  if (end < 0) return no('is no zip archive');
  let [count, at] = [bytes.readUInt16LE(end + 10), bytes.readUInt32LE(end + 16)];
  const end64 = bytes.lastIndexOf(Buffer.from('PK\x06\x06', 'latin1'), end);
  if (end64 >= 0 && (count === 0xffff || at === 0xffffffff))
    [count, at] = [Number(bytes.readBigUInt64LE(end64 + 32)), Number(bytes.readBigUInt64LE(end64 + 48))];
  const files = new Map<string, Buffer>();
  for (; count > 0; count--) {
    if (bytes.toString('latin1', at, at + 4) !== 'PK\x01\x02') return no('its list of files is broken');
    if (bytes.readUInt16LE(at + 10) !== 0) return no('its files are compressed');
    let [size, begin] = [bytes.readUInt32LE(at + 24), bytes.readUInt32LE(at + 42)];
    const [nameBytes, extraBytes] = [bytes.readUInt16LE(at + 28), bytes.readUInt16LE(at + 30)];
    const name = bytes.toString('utf8', at + 46, at + 46 + nameBytes);
    const extraEnd = at + 46 + nameBytes + extraBytes;
    for (let extra = at + 46 + nameBytes; extra + 4 <= extraEnd; extra += 4 + bytes.readUInt16LE(extra + 2)) {
      if (bytes.readUInt16LE(extra) !== 1) continue; // the 64-bit values of those fields that are full, in order
      let value = extra + 4;
      const wide = () => {
        value += 8;
        return Number(bytes.readBigUInt64LE(value - 8));
      };
      if (size === 0xffffffff) size = wide();
      if (bytes.readUInt32LE(at + 20) === 0xffffffff) wide(); // the compressed size is the same
      if (begin === 0xffffffff) begin = wide();
    }
    const data = begin + 30 + bytes.readUInt16LE(begin + 26) + bytes.readUInt16LE(begin + 28);
    if (data + size > bytes.length) return no(`ends too early, within ${name}`);
    files.set(name, bytes.subarray(data, data + size));
    at = extraEnd + bytes.readUInt16LE(at + 32); // a comment ends the entry
  }
  return files;
}

/** A tensor of the archive, its numbers not yet read: those of the optimiser never are. */
class StoredTensor {
  readonly shape: readonly number[];
  readonly read: () => Float32Array;
  constructor(shape: readonly number[], read: () => Float32Array) {
    this.shape = shape;
    this.read = read;
  }
}
/** A class or function that the pickle names; it is never looked up. */
class Named {
  readonly name: string;
  constructor(name: string) {
    this.name = name;
  }
}
const STORAGES: Record<string, [dtype: string, bytes: number]> = {
  FloatStorage: ['F32', 4],
  HalfStorage: ['F16', 2],
  BFloat16Storage: ['BF16', 2],
  DoubleStorage: ['F64', 8],
};

/** What torch.save put into the file: dictionaries as Map, tuples and lists as arrays, tensors as StoredTensor. */
function readPickledArchive(file: string): unknown {
  const files = readZip(
    file,
    orRefuse(file, () => fs.readFileSync(file)),
  );
  const pickle = [...files.keys()].find(name => name.endsWith('/data.pkl'));
  if (!pickle) return refuse(`${file}: has no data.pkl; takes a .pt as PyTorch 1.6 and later save it`);
  const folder = pickle.slice(0, -'data.pkl'.length);

  /** What a call in the pickle gives: dictionaries and tensors are known, anything else is a bystander (null). */
  const call = (callee: unknown, args: unknown[]): unknown => {
    const name = callee instanceof Named ? callee.name : '';
    if (name === 'collections.OrderedDict') return new Map();
    if (name === 'torch._utils._rebuild_parameter') return args[0];
    if (name !== 'torch._utils._rebuild_tensor_v2') return null;
    const [storage, first, shape, strides] = args as [unknown[], number, number[], number[]];
    const [, kind, key] = storage as [string, Named, string];
    return new StoredTensor(shape, () => {
      const typeName = kind.name.replace(/^torch\./, '');
      const [dtype, width] = STORAGES[typeName] ?? refuse(`${file}: holds ${typeName}, takes ${Object.keys(STORAGES)}`);
      const rowMajor = shape.map((_, i) => sizeOf(shape.slice(i + 1)));
      if (shape.some((d, i) => d !== 1 && strides[i] !== rowMajor[i])) refuse(`${file}: a tensor is not contiguous`);
      const stored = files.get(`${folder}data/${key}`) ?? refuse(`${file}: has no ${folder}data/${key}`);
      const [begin, end] = [first * width, (first + sizeOf(shape)) * width];
      if (end > stored.length) refuse(`${file}: ${folder}data/${key} ends too early`);
      return Float32Array.from(DECODERS[dtype]!(Uint8Array.from(stored.subarray(begin, end)).buffer));
    });
  };
  return orRefuse(`${file}: data.pkl`, () => readPickle(files.get(pickle)!, call));
}

/** A pickle of protocol 2, the one that torch.save writes. @throws Error for what it has no opcode of */
function readPickle(bytes: Buffer, call: (callee: unknown, args: unknown[]) => unknown): unknown {
  const MARK = Symbol('mark');
  const stack: unknown[] = [];
  const memo = new Map<number, unknown>();
  let at = 0;
  /** Where the next n bytes begin. */
  const take = (n: number) => {
    at += n;
    return at - n;
  };
  const line = () => {
    const begin = at;
    at = bytes.indexOf(10, at) + 1;
    return bytes.toString('utf8', begin, at - 1);
  };
  const text = (n: number) => bytes.toString('utf8', take(n), at);
  const toMark = () => stack.splice(stack.lastIndexOf(MARK)).slice(1);
  const last = <X>() => stack.at(-1) as X;
  const setItems = (items: unknown[]) => {
    const target = last<unknown>();
    for (let i = 0; i + 1 < items.length; i += 2) if (target instanceof Map) target.set(items[i], items[i + 1]);
  };
  const append = (items: unknown[]) => {
    const target = last<unknown>();
    if (Array.isArray(target)) target.push(...items);
  };
  const run: Record<string, () => unknown> = {
    '\x80': () => take(1),
    '(': () => stack.push(MARK),
    '}': () => stack.push(new Map()),
    ']': () => stack.push([]),
    ')': () => stack.push([]),
    N: () => stack.push(null),
    '\x88': () => stack.push(true),
    '\x89': () => stack.push(false),
    K: () => stack.push(bytes.readUInt8(take(1))),
    M: () => stack.push(bytes.readUInt16LE(take(2))),
    J: () => stack.push(bytes.readInt32LE(take(4))),
    G: () => stack.push(bytes.readDoubleBE(take(8))),
    '\x8a': () => {
      const n = bytes.readUInt8(take(1)); // a little-endian integer of n bytes (none is negative)
      stack.push(bytes.subarray(take(n), at).reduceRight((value, byte) => 256 * value + byte, 0));
    },
    X: () => stack.push(text(bytes.readUInt32LE(take(4)))),
    c: () => stack.push(new Named(`${line()}.${line()}`)),
    q: () => memo.set(bytes.readUInt8(take(1)), last()),
    r: () => memo.set(bytes.readUInt32LE(take(4)), last()),
    h: () => stack.push(memo.get(bytes.readUInt8(take(1)))),
    j: () => stack.push(memo.get(bytes.readUInt32LE(take(4)))),
    t: () => stack.push(toMark()),
    '\x85': () => stack.push(stack.splice(-1)),
    '\x86': () => stack.push(stack.splice(-2)),
    '\x87': () => stack.push(stack.splice(-3)),
    Q: () => {}, // a persistent id stays what it is: the tuple that names a storage
    R: () => {
      const [callee, args] = stack.splice(-2);
      stack.push(call(callee, args as unknown[]));
    },
    '\x81': () => stack.splice(-2, 2, null),
    b: () => stack.pop(), // the state of an object: nothing that is needed
    s: () => setItems(stack.splice(-2)),
    u: () => setItems(toMark()),
    a: () => append(stack.splice(-1)),
    e: () => append(toMark()),
  };
  while (at < bytes.length) {
    const code = String.fromCharCode(bytes[take(1)]!);
    if (code === '.') return stack.pop();
    const job = run[code];
    if (!job) throw new Error(`byte ${at - 1}: opcode ${JSON.stringify(code)} is none that torch.save writes here`);
    job();
  }
  throw new Error('ends too early');
}

// ---- C. Tokenizers --------------------------------------------------------------------------------------------------

const BYTES = 256;
const KINDS = ['', 'normal', 'unknown', 'control', 'user-defined', 'unused', 'byte'] as const; // sentencepiece's numbers
/** A token: its text with ▁ for a space, the score by which BPE merges (highest first). */
export type Piece = { piece: string; score: number; kind: (typeof KINDS)[number] };

/** The .bin that llama2.c's C program reads: the longest length, then score, length and text of every token. */
export function readTokenizerBin(file: string, vocab: number): Piece[] {
  const bytes = orRefuse(file, () => fs.readFileSync(file));
  const texts: { text: string; score: number }[] = [];
  let at = 4;
  for (let id = 0; id < vocab; id++) {
    const end = at + 8 <= bytes.length ? at + 8 + bytes.readUInt32LE(at + 4) : Infinity;
    if (end > bytes.length) return refuse(`${file}: ends too early, at token ${id} of the checkpoint's ${vocab}`);
    texts.push({ text: bytes.toString('utf8', at + 8, end), score: bytes.readFloatLE(at) });
    at = end;
  }
  if (at !== bytes.length) return refuse(`${file}: has more than the checkpoint's ${vocab} tokens`);
  // 0, 1 and 2 are <unk>, <s> and </s>; the bytes come next, as themselves or by their name
  const byteName = (b: number) => `<0x${b.toString(16).toUpperCase().padStart(2, '0')}>`;
  const hasBytes = texts.slice(3, 3 + BYTES).filter(({ text }, b) => text === byteName(b) || isByte(text, b)).length;
  return texts.map(({ text, score }, id): Piece => {
    if (id < 3) return { piece: ['<unk>', '<s>', '</s>'][id]!, score, kind: id ? 'control' : 'unknown' };
    if (hasBytes === BYTES && id < 3 + BYTES) return { piece: byteName(id - 3), score, kind: 'byte' };
    return { piece: text.replaceAll(' ', '▁'), score, kind: 'normal' };
  });
}
const isByte = (text: string, b: number) => text === String.fromCharCode(b);

/** The fields of a protobuf message: number and value, a number for fixed-size ones, bytes for the rest. */
function* protobuf(bytes: Buffer): Generator<[field: number, value: number | Buffer]> {
  let at = 0;
  const varint = () => {
    for (let value = 0, scale = 1; ; scale *= 128) {
      const byte = bytes.readUInt8(at++);
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const [field, wire] = [Math.floor(tag / 8), tag % 8];
    if (wire === 0) yield [field, varint()];
    else {
      const size = wire === 1 ? 8 : wire === 2 ? varint() : wire === 5 ? 4 : Number.NaN;
      if (!(at + size <= bytes.length)) throw new Error('is no protobuf, or ends too early');
      const value = bytes.subarray(at, at + size);
      at += size;
      yield [field, wire === 2 ? value : wire === 1 ? value.readDoubleLE() : value.readFloatLE()];
    }
  }
}

/** A sentencepiece .model. @throws UsageError unless it is BPE, with the checkpoint's number of tokens */
export function readSentencepiece(file: string, vocab: number): Piece[] {
  const bytes = orRefuse(file, () => fs.readFileSync(file));
  return orRefuse(file, () => {
    const pieces: Piece[] = [];
    let model = 1; // unigram, where the trainer's settings say nothing
    for (const [field, value] of protobuf(bytes)) {
      if (field === 2 && value instanceof Buffer)
        for (const [name, setting] of protobuf(value)) if (name === 3) model = Number(setting);
      if (field !== 1 || !(value instanceof Buffer)) continue;
      const { 1: piece = '', 2: score = 0, 3: kind = 1 } = Object.fromEntries(protobuf(value));
      pieces.push({ piece: `${piece}`, score: Number(score), kind: KINDS[Number(kind)] ?? '' });
    }
    if (model !== 2) throw new Error('is no sentencepiece model of type BPE');
    if (pieces.length !== vocab) throw new Error(`has ${pieces.length} tokens, the checkpoint ${vocab}`);
    return pieces;
  });
}

/**
 * A tokenizer.json that encodes as sentencepiece's BPE does. There two neighbours are merged by the score of what they
 * make, so every way to make a token from two others is a merge, the highest scores first.
 */
export function tokenizerJson(pieces: readonly Piece[]): object {
  const ids = new Map(pieces.map(({ piece }, id) => [piece, id]));
  const merges = pieces.flatMap(({ piece, score, kind }) => {
    const characters = kind === 'normal' ? [...piece] : [];
    const halves = characters.slice(1).map((_, i) => [characters.slice(0, i + 1), characters.slice(i + 1)]);
    return halves
      .map(([left, right]) => ({ score, left: left!.join(''), right: right!.join('') }))
      .filter(({ left, right }) => ids.has(left) && ids.has(right))
      .sort((a, b) => ids.get(a.left)! - ids.get(b.left)! || ids.get(a.right)! - ids.get(b.right)!);
  });
  merges.sort((a, b) => b.score - a.score);
  const special = pieces.flatMap(({ piece: content, kind }, id) => {
    if (kind !== 'unknown' && kind !== 'control' && kind !== 'user-defined') return [];
    const whole = { single_word: false, lstrip: false, rstrip: false, normalized: false };
    return [{ id, content, ...whole, special: kind !== 'user-defined' }];
  });
  const [unknown, begin] = ['unknown', 'control'].map(kind => pieces.find(p => p.kind === kind)?.piece);
  const first = { SpecialToken: { id: begin, type_id: 0 } };
  const sequence = (id: string) => ({ Sequence: { id, type_id: id === 'A' ? 0 : 1 } });
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: special,
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'Prepend', prepend: '▁' },
        { type: 'Replace', pattern: { String: ' ' }, content: '▁' },
      ],
    },
    pre_tokenizer: null,
    post_processor: {
      type: 'TemplateProcessing',
      single: [first, sequence('A')],
      pair: [sequence('A'), sequence('B')],
      special_tokens: { [begin!]: { id: begin, ids: [ids.get(begin!)], tokens: [begin] } },
    },
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: unknown,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: pieces.some(({ kind }) => kind === 'byte'),
      vocab: Object.fromEntries(ids),
      merges: merges.map(({ left, right }) => `${left} ${right}`),
    },
  };
}

// ---- D. The folder --------------------------------------------------------------------------------------------------

/** Writes the folder `out`, whole or not at all. @throws UsageError for files it can't take, or where `out` is there */
export async function convert(checkpointFile: string, tokenizerFile: string, out: string): Promise<Checkpoint> {
  if (fs.existsSync(out)) refuse(`${out}: is there already; takes a folder that is not`);
  const checkpoint = (checkpointFile.endsWith('.pt') ? readPt : readBin)(checkpointFile);
  const { shape, tied, tensors } = checkpoint;
  const { dim, hiddenDim, nLayers, nHeads, nKvHeads, vocab, context, normEps } = shape;
  const headDim = dim / nHeads;
  const readPieces = tokenizerFile.endsWith('.model') ? readSentencepiece : readTokenizerBin;
  const pieces = readPieces(tokenizerFile, vocab);
  const [unknown, begin, end] = [0, 1, 2].map(id => pieces[id]?.piece);

  const halved = (own: string, W: Float32Array) =>
    /\.w[qk]\.weight$/.test(own) ? halvesFromPairs(W, own.includes('.wq.') ? nHeads : nKvHeads, headDim) : W;
  const head: [string, string, number[]][] = tied ? [] : [['output.weight', 'lm_head.weight', [vocab, dim]]];
  const list = [...allTensors(shape), ...head].map(([own, name, size]) => {
    return { name, shape: size, data: () => halved(own, tensors.get(own)!) };
  });
  list.sort((a, b) => (a.name < b.name ? -1 : 1));
  const config = {
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    hidden_size: dim,
    intermediate_size: hiddenDim,
    num_hidden_layers: nLayers,
    num_attention_heads: nHeads,
    num_key_value_heads: nKvHeads,
    head_dim: headDim,
    vocab_size: vocab,
    max_position_embeddings: context,
    rms_norm_eps: normEps,
    rope_theta: ROPE_THETA,
    hidden_act: 'silu',
    attention_bias: false,
    mlp_bias: false,
    tie_word_embeddings: tied,
    bos_token_id: 1,
    eos_token_id: 2,
    torch_dtype: 'float32',
  };
  const tokenizerConfig = {
    tokenizer_class: 'LlamaTokenizer',
    bos_token: begin,
    eos_token: end,
    unk_token: unknown,
    add_bos_token: true,
    add_eos_token: false,
    model_max_length: context,
  };
  const beside = `${out}.tmp-${process.pid}`;
  fs.mkdirSync(beside, { recursive: true });
  try {
    const write = (name: string, value: object) =>
      fs.writeFileSync(path.join(beside, name), JSON.stringify(value, null, 1));
    write('config.json', config);
    write('tokenizer.json', tokenizerJson(pieces));
    write('tokenizer_config.json', tokenizerConfig);
    await writeSafetensors(path.join(beside, 'model.safetensors'), list, { format: 'pt' });
    fs.renameSync(beside, out);
  } finally {
    fs.rmSync(beside, { recursive: true, force: true });
  }
  return checkpoint;
}

/** The command line. @throws UsageError */
export async function main(args: string[]): Promise<void> {
  const string = { type: 'string' } as const;
  const options = { checkpoint: string, tokenizer: string, out: string, help: { type: 'boolean' } } as const;
  const { values } = orRefuse(USAGE, () => parseArgs({ args, options }));
  const { checkpoint, tokenizer, out, help } = values;
  if (help) return console.log(USAGE);
  if (!checkpoint || !tokenizer || !out) return refuse(`takes ${USAGE}`);
  const { shape, tied } = await convert(checkpoint, tokenizer, out);
  const { nLayers, dim, vocab } = shape;
  console.log(`${out}: ${nLayers} layers, width ${dim}, vocabulary ${vocab}, ${tied ? 'tied' : 'separate'} head`);
}

if (process.argv[1] && fs.realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  main(process.argv.slice(2)).catch((error: Error) => {
    const usage = error.name === 'UsageError';
    process.stderr.write(`llama2c: ${usage ? error.message : error.stack}\n`);
    process.exitCode = usage ? 2 : 1;
  });
}
