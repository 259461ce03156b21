/**
 * nano-param-decomp: adversarial parameter decomposition (VPD) of a trained language model, in one file.
 *
 * Every weight matrix of the target is written as a sum of rank-one subcomponents, and a small transformer (the
 * causal-importance function) learns which few of them each token really needs: whatever it calls unimportant may be
 * removed, at random or by an adversary, and the model must still say the same. What is left is the network taken
 * apart into small mechanisms that can be looked at one by one.
 *
 *   npm install && npm start                         the bundled toy: decompose, evaluate, harvest, page
 *   npx tsx nano-param-decomp.ts --model M --data D   your own: a Hugging Face folder or hub id, and a text file
 *   npx tsx nano-param-decomp.ts --help               every field of the config is a flag
 *
 * Contents (the letters are the rulers below; "method n" is the section of the method in README.md)
 *   A. Config            one record: type, default, flag, help
 *   B. Engine            TensorFlow, WebGPU or WASM under TFJS; random numbers from (seed, step, purpose)
 *   C. Target model      safetensors, Hugging Face configs, one decoder for all of them
 *   D. Data              text to rows of tokens
 *   E. Components        V, U and the masked forward                              method 1
 *   F. CI function       the causal-importance transformer, the two sigmoids      method 2
 *   G. Losses            faithfulness, importance minimality, reconstruction      method 3
 *   H. Persistent PGD    the adversary                                            method 4
 *   I. Optimisation      schedules, Adam, the training step                       method 5
 *   J. Evaluation        the original's metrics, and ours                         method 6
 *   K. Run folder        config, metrics, checkpoints
 *   L. Harvest           what every component does; the scoreboard of known rules
 *   M. Report            the page
 *   N. Command line      the jobs: decompose, eval, harvest
 *
 * Left out on purpose: several GPUs, embeddings and unembeddings as modules, targets other than decoder language
 * models, hyperparameter search, experiment trackers.
 *
 * Conventions: N = B·S positions; activations are [N, ·] matrices (only attention unfolds B and S). A module has C
 * components; ΣC are those of all M modules side by side, modules sorted by path ("wide" tensors).
 */
import { spawnSync } from 'node:child_process';
import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as os from 'node:os';
import * as path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { Tokenizer } from '@huggingface/tokenizers';
import * as tf from '@tensorflow/tfjs';

/** A tensor with its axes named for the reader: T<'N dIn'>. */
export type T<_Axes extends string = string> = tf.Tensor;
type Tensors = Record<string, tf.Tensor>;

/** Wrong input (a flag, a file, a folder): reported in one line, exit code 2. */
export class UsageError extends Error {
  override readonly name = 'UsageError'; // by which those of engine/ are known too
}
/** Refuses it. Parts of the message may be a stranger's text: one line, no control or direction marks. */
function refuse(message: string): never {
  throw new UsageError(message.slice(0, 500).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '?'));
}

// ---- A. Config ------------------------------------------------------------------------------------------------------
// One record gives each field its type, default, bounds, flag (kebab-case) and line in --help. Defaults are the paper's
// run (method 5); "0 = auto" are sizes that follow the target, by a rule that gives the paper's at the paper's target.

interface Field<V> {
  value: V;
  help: string;
  min?: number;
  max?: number;
  integer?: boolean;
  choices?: string;
}
const real = (value: number, help: string, min = 0, max = 1e12): Field<number> => ({ value, help, min, max });
const int = (value: number, help: string, min = 0, max = 1e9) => ({ ...real(value, help, min, max), integer: true });
const text = (value: string, help: string, choices = ''): Field<string> => ({ value, help, choices });
const flag = (value: boolean, help: string): Field<boolean> => ({ value, help });

const GROUPS = {
  'Target and data': {
    model: text('', 'Hugging Face folder, or hub id org/name[@revision]'),
    data: text('', 'training data: .txt, .jsonl, .json rows of ids, or a hub dataset org/name'),
    evalData: text('', 'held-out data; without it the last 5 % of the documents, never trained on'),
    labels: text('', 'JSON with the rules in force in the rows of --eval-data: adds a scoreboard'),
    seqLen: int(512, 'tokens in a row, at most what the target allows', 2, 1 << 20),
    components: text('auto', 'pattern=C, first match wins: "*.q_proj=64,*.mlp.*=172"; auto: all, C = max(dIn, dOut)'),
    out: text('', 'run folder; without it runs/<model>-<time>'),
  },
  Training: {
    nSteps: int(400_000, 'training steps', 1),
    batchSize: int(64, 'rows in a batch; if not given, 2 on a CPU engine', 1),
    microBatches: int(1, 'shards of a batch, one after another (R of the importance loss)', 1),
    seed: int(0, 'every random number is a function of (seed, step, purpose)', 0, 2 ** 31 - 1),
    mainLr: real(5e-5, 'AdamW learning rate of V, U and the CI function'),
    mainLrFinalFrac: real(0.1, 'where its cosine ends', 0, 1),
    gradClipComponents: real(0.01, 'clips the joint gradient norm of all V and U; 0 = off'),
    gradClipCi: real(0, "the same for the CI function; 0 = off, the paper's choice"),
    faithfulnessWarmupSteps: int(400, 'steps on the faithfulness loss alone, before training'),
    faithfulnessWarmupLr: real(1e-3, 'their learning rate'),
    faithfulnessWarmupLrFinalFrac: real(1, 'where its cosine ends; 1 = constant', 0, 1),
  },
  Losses: {
    coeffFaith: real(1e7, 'coefficient of the faithfulness loss'),
    coeffImp: real(2e-4, 'of the importance-minimality loss'),
    coeffStoch: real(0.5, 'of the stochastic reconstruction loss'),
    coeffPpgd: real(0.5, 'of the adversarial reconstruction loss; 0 = no adversary'),
    pStart: real(2, 'exponent p of the importance loss at the start', 0.01, 10),
    pEnd: real(0.4, 'and at the end (linear)', 0.01, 10),
    impEps: real(1e-12, 'added to g before the power'),
    impBeta: real(0.5, 'weight of the frequency term'),
    leakyAlpha: real(0.01, 'slope of the leaky sigmoids outside [0, 1]', 0, 1),
  },
  'CI function': {
    ciDModel: int(0, 'width; 0 = auto: 8/3 of the target width (paper: 2048 at 768)', 0, 1 << 17),
    ciNBlocks: int(0, 'blocks; 0 = auto: twice the target layers (paper: 8 at 4)', 0, 4096),
    ciNHeads: int(0, 'heads; 0 = auto: one per 64 of width, at least 4, at most 16', 0, 4096),
    ciMlpHidden: int(0, 'MLP width; 0 = auto: 4 times the width', 0, 1 << 20),
    ciRopeBase: real(10_000, 'base of its rotary embedding', 1),
  },
  'Persistent PGD': {
    ppgdLr: real(0.01, 'learning rate of the adversarial sources'),
    ppgdLrFinalFrac: real(1, 'where its cosine ends; 1 = constant', 0, 1),
    ppgdWarmupPct: real(0.025, 'share of the steps over which it rises from 0', 0, 1),
    ppgdBeta1: real(0.5, 'Adam of the sources', 0, 0.999999),
    ppgdBeta2: real(0.99, 'Adam of the sources', 0, 0.999999),
    ppgdEps: real(1e-8, 'Adam of the sources'),
    ppgdInnerSteps: int(2, 'ascent steps before each training step', 0, 1000),
  },
  Evaluation: {
    evalFreq: int(1000, 'steps between evaluations; 0 = only at the end'),
    slowEvalFreq: int(5000, 'steps between slow evaluations; 0 = only at the end'),
    evalBatchSize: int(0, 'rows of an evaluation batch; 0 = auto: the batch size'),
    ciAliveThreshold: real(0, 'a component counts in L0 where g is above this', 0, 1),
    roundingThreshold: real(0, 'rounded masks are 1 where g is above this', 0, 1),
    pgdEvalStepSize: real(0.1, 'step of the fresh sign-PGD adversary'),
    pgdEvalNSteps: int(20, 'its steps', 0, 10_000),
  },
  Run: {
    logEvery: int(100, 'steps between lines of metrics.jsonl', 1),
    saveEvery: int(5000, 'steps between checkpoints; 0 = only at the end'),
    harvest: flag(true, 'harvest and write the page at the end (--no-harvest leaves it out)'),
    harvestRows: int(4096, 'training rows that the harvest reads; 0 = all'),
  },
  Engine: {
    engine: text('auto', 'auto: TensorFlow if it loads, else WASM', 'auto tensorflow webgpu wasm'),
    precision: text('auto', 'of matrix products; auto: tf32 on CUDA, else float32', 'auto float32 tf32 bf16'),
    graph: flag(true, 'trace the step into a TensorFlow graph (--no-graph runs it op by op)'),
    xla: text('auto', 'compile the graph with XLA; auto: on a CPU from 10,000 steps on', 'auto on off'),
    threads: int(0, 'threads of the TensorFlow CPU engine; 0 = all cores', 0, 1024),
  },
};
type Merged<U> = (U extends unknown ? (u: U) => void : never) extends (merged: infer I) => void ? I : never;
type Fields = Merged<(typeof GROUPS)[keyof typeof GROUPS]>;
/** Every field with its value: what config.json stores. */
export type Config = { [K in keyof Fields]: Fields[K] extends Field<infer V> ? V : never };
type Value = string | number | boolean;
const FIELDS: Record<string, Field<Value>> = Object.assign({}, ...Object.values(GROUPS));
export const DEFAULTS = Object.fromEntries(Object.entries(FIELDS).map(([k, f]) => [k, f.value])) as Config;

const bundled = (file: string) => fileURLToPath(new URL(`assets/toy/${file}`, import.meta.url));
/** Named settings: the difference to the defaults, with its source. */
interface Preset {
  source: string;
  config: Partial<Config>;
  /** the target that it is meant for */
  target?: Partial<Architecture>;
}
export const PRESETS: Record<string, Preset> = {
  toy: {
    source: 'ours: the bundled one-layer target with known rules',
    config: {
      ...{
        model: bundled(''),
        data: bundled('corpus.txt'),
        evalData: bundled('eval.json'),
        labels: bundled('labels.json'),
      },
      ...{ components: '*.attn.*=48,*.mlp.*=128', seqLen: 32, batchSize: 16, nSteps: 2000, mainLr: 7e-3 },
      ...{ coeffFaith: 1e4, coeffImp: 5e-4, impBeta: 4, ppgdLr: 0.05, seed: 0 },
      ...{ faithfulnessWarmupLr: 5e-3, faithfulnessWarmupLrFinalFrac: 0.05 },
      ...{ ciDModel: 64, ciNBlocks: 1, ciNHeads: 4, ciMlpHidden: 256 },
      ...{ evalFreq: 1000, slowEvalFreq: 0, evalBatchSize: 128, saveEvery: 1000 },
    },
  },
  'simplestories-2L': {
    source: "the original's small public preset for its 2-layer SimpleStories target; method 5",
    target: { nLayers: 2, dModel: 192, nHeads: 6, vocab: 4019 },
    config: {
      components: '*.q_proj=288,*.k_proj=288,*.v_proj=384,*.o_proj=480,*.c_fc=1152,*.down_proj=960',
      ...{ ciDModel: 512, ciNBlocks: 4, ciNHeads: 8, ciMlpHidden: 2048, coeffImp: 1e-3, mainLr: 3e-4 },
    },
  },
  'pile-4L': {
    source: "the paper's run on its 4-layer Pile target, 400k steps of 64 x 512 tokens; method 5",
    target: { nLayers: 4, dModel: 768, nHeads: 6, dMlp: 3072, vocab: 50_277 },
    config: {
      components: '*.q_proj=512,*.k_proj=512,*.v_proj=1024,*.o_proj=1024,*.c_fc=3072,*.down_proj=3584',
      ...{ batchSize: 64, seqLen: 512, ciDModel: 2048, ciNBlocks: 8, ciNHeads: 16, ciMlpHidden: 8192 },
    },
  },
};

const kebab = (name: string) => name.replace(/[A-Z]/g, c => `-${c.toLowerCase()}`);

/** A field's value from the text of its flag. @throws UsageError naming the flag, what it got and what it takes */
function fieldValue(name: string, raw: Value): Value {
  const { value: standard, choices, min = 0, max = 0, integer } = FIELDS[name]!;
  const takes = (what: string) => refuse(`--${kebab(name)}: got ${JSON.stringify(raw)}, takes ${what}`);
  if (typeof standard === 'boolean') return typeof raw === 'boolean' ? raw : takes('no value');
  if (typeof standard === 'string') {
    const fits = typeof raw === 'string' && (!choices || choices.split(' ').includes(raw));
    return fits ? raw : takes(`one of ${choices}`);
  }
  const value = typeof raw === 'string' && raw.trim() === '' ? Number.NaN : Number(raw);
  const fits = value >= min && value <= max && (!integer || Number.isInteger(value));
  return fits ? value : takes(`${integer ? 'an integer' : 'a number'} from ${min} to ${max}`);
}

// ---- B. Engine ------------------------------------------------------------------------------------------------------
// The maths is plain TFJS. What makes an engine fast (the traced graph, better WASM kernels) is in engine/ and
// optional: without that folder everything runs op by op.

export interface Engine {
  readonly name: string;
  readonly gpu: boolean;
  /** One line for people: which engine, and why. */
  readonly description: string;
  /**
   * A function with the same meaning as `fn`, and faster where the engine can trace it: `fn` is then run once as it is
   * and from then on as one graph. So whatever changes from call to call must enter through `feeds`, and no branch of
   * JavaScript may depend on a tensor's value. `fn` may assign tf.Variables: those are the state.
   */
  compile<F extends Tensors, O extends Tensors>(name: string, fn: (feeds: F) => O): (feeds: F) => Promise<O>;
}
/** tf.tidy for an async function: disposes of the tensors made in it. (Jobs run one at a time.) */
export async function tidyAsync<X>(job: () => Promise<X>): Promise<X> {
  tf.engine().startScope();
  try {
    return await job();
  } finally {
    tf.engine().endScope();
  }
}
const numbers = async (t: T): Promise<Float32Array> => (await t.data()) as Float32Array;

/** Right on every engine, and what a traced graph is compared with. */
const opByOp: Pick<Engine, 'compile'> = { compile: (_name, fn) => async feeds => tf.tidy(() => fn(feeds)) };

/** import() of a part that may be missing. */
async function optional<M>(part: Promise<M>): Promise<M | undefined> {
  try {
    return await part;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ERR_MODULE_NOT_FOUND') throw error;
  }
}

type EngineOptions = Pick<Config, 'engine' | 'precision' | 'graph' | 'xla' | 'threads'> & { nSteps?: number };

/** Starts the engine that the config asks for. @throws UsageError if it isn't there */
export async function startEngine(options: EngineOptions): Promise<Engine> {
  let why = '';
  if (options.engine === 'webgpu') return startWebGpu();
  if (options.engine !== 'wasm') {
    try {
      return await startTensorFlow(options);
    } catch (error) {
      why = `; ${(error as Error).message.split('\n')[0]}`;
      if (options.engine === 'tensorflow') refuse(`--engine tensorflow${why}`);
    }
  }
  if (/tf32|bf16/.test(options.precision)) refuse(`--precision ${options.precision}: only on TensorFlow${why}`);
  const name = (await startWasm()) ? 'wasm' : 'cpu';
  if (name === 'cpu') await tf.setBackend('cpu');
  const what = name === 'wasm' ? 'WASM' : 'plain JavaScript, slow (no @tensorflow/tfjs-backend-wasm)';
  return { name, gpu: false, ...opByOp, description: `TFJS ${tf.version.tfjs} on ${what}${why}` };
}

async function startTensorFlow({ precision, graph, xla, threads, nSteps = 0 }: EngineOptions): Promise<Engine> {
  const engine = await optional(import('./engine/tensorflow.ts'));
  if (!engine) {
    await import('@tensorflow/tfjs-node-gpu' as string);
    await tf.setBackend('tensorflow');
    return { name: 'tensorflow', gpu: false, ...opByOp, description: 'TensorFlow, op by op (no engine/ folder)' };
  }
  const { loadTensorFlow, useBf16Products } = engine;
  const { Graph } = await import('./engine/graph.ts');
  const products = precision === 'auto' ? {} : { precision: precision as 'float32' | 'tf32' | 'bf16' };
  const { version, gpu } = await loadTensorFlow({ ...products, ...(threads > 0 ? { threads } : {}) });
  if (precision === 'bf16') useBf16Products();
  // on a CPU XLA saves a tenth to a third of a step, after compiling for a minute in all; on CUDA nobody measured it
  const compiled = graph && (xla === 'on' || (xla === 'auto' && nSteps >= 10_000 && !gpu));
  const session = graph ? new Graph({ xla: compiled }) : undefined;
  const run: Pick<Engine, 'compile'> = session ? { compile: (name, fn) => session.compile(name, fn) } : opByOp;
  const how = session ? `traced graph${compiled ? ', XLA' : ''}` : 'op by op';
  return {
    name: 'tensorflow',
    gpu,
    ...run,
    description: `TensorFlow ${version} on ${gpu ? 'CUDA' : 'the CPU'}, ${how}`,
  };
}

async function startWasm(): Promise<boolean> {
  const engine = await optional(import('./engine/wasm.ts'));
  if (!engine) return (await optional(import('@tensorflow/tfjs-backend-wasm'))) !== undefined && tf.setBackend('wasm');
  await engine.loadWasm();
  engine.fastWasmKernels();
  return true;
}

/** Node has no GPU object of its own: the npm package `webgpu` (Dawn) brings one. */
async function startWebGpu(): Promise<Engine> {
  try {
    const { create, globals } = (await import('webgpu' as string)) as { create(o: string[]): unknown; globals: object };
    Object.assign(globalThis, globals);
    Object.defineProperty(globalThis, 'navigator', { value: { gpu: create([]) }, configurable: true });
    await import('@tensorflow/tfjs-backend-webgpu' as string);
    if (!(await tf.setBackend('webgpu'))) throw new Error('no adapter');
  } catch (error) {
    const reason = (error as Error).message.split('\n')[0];
    refuse(`--engine webgpu: ${reason} (npm install --no-save webgpu @tensorflow/tfjs-backend-webgpu)`);
  }
  return { name: 'webgpu', gpu: true, ...opByOp, description: `TFJS ${tf.version.tfjs} on WebGPU` };
}

/** What a random number is for. With the seed and the step it is its whole address, so a step can be replayed. */
const PURPOSE = {
  ...{ mask: 1, delta: 2, route: 3, routeCount: 4, randomMask: 5, pgd: 6, shuffle: 7, sources: 8, harvest: 9 },
  init: 16,
};

/** The part of the address that changes from step to step: a tensor, since it must enter a traced graph as a feed. */
export const randomKey = (seed: number, step: number): tf.Tensor1D => tf.tensor1d([scramble(seed), step], 'int32');

/** Uniform numbers in [0, 1), a function of (key, purpose) alone; each engine has its own bits. */
export function uniform(shape: number[], key: tf.Tensor, purpose: number): tf.Tensor {
  if (tf.getBackend() !== 'tensorflow') {
    const [seed = 0, step = 0] = key.dataSync();
    return tf.tensor(uniformArray(tf.util.sizeFromShape(shape), seed, step, purpose), shape);
  }
  const backend = tf.backend() as unknown as {
    binding: Record<'TF_ATTR_TYPE' | 'TF_FLOAT' | 'TF_INT32', number>;
    executeSingleOutput(op: string, attrs: object[], inputs: tf.Tensor[]): tf.Tensor;
  };
  const { TF_ATTR_TYPE: type, TF_FLOAT, TF_INT32 } = backend.binding;
  const types = Object.entries({ dtype: TF_FLOAT, T: TF_INT32, Tseed: TF_INT32 });
  const attrs = types.map(([name, value]) => ({ name, type, value }));
  const seed = tf.add(key, tf.tensor1d([purpose, 0], 'int32'));
  return backend.executeSingleOutput('StatelessRandomUniform', attrs, [tf.tensor1d(shape, 'int32'), seed]);
}

/**
 * n uniform numbers in [0, 1), a function of (seed, step, purpose) alone: the generator sfc32, 24 bits a number.
 * Different keys start from different states, because every line of the seeding can be undone.
 */
export function uniformArray(n: number, seed: number, step: number, purpose: number): Float32Array {
  let a = scramble(seed);
  let b = scramble(a ^ step);
  let c = scramble(b ^ purpose);
  let counter = 1;
  const out = new Float32Array(n);
  for (let i = -12; i < n; i++) {
    // the first twelve spread each bit of the key over the whole state
    const t = (a + b + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + t) | 0;
    if (i >= 0) out[i] = (t >>> 8) / 0x1000000;
  }
  return out;
}

/** A permutation of the 32-bit numbers in which every bit of the input reaches every bit of the output. */
function scramble(x: number): number {
  let h = (x + 0x9e3779b9) | 0;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return h ^ (h >>> 16);
}

// ---- C. Target model ------------------------------------------------------------------------------------------------
// A safetensors file: 8 bytes of header length, a JSON header, then the tensors' bytes side by side.

const DTYPES = 'BOOL U8 I8 F8_E5M2 F8_E4M3 U16 I16 F16 BF16 U32 I32 F32 U64 I64 F64 C64'.split(' ');
const dtypeBytes = (dtype: string) => Number(/\d+/.exec(dtype)?.[0] ?? 8) / 8; // BOOL takes a byte
const sizeOf = (shape: readonly number[]) => shape.reduce((n, d) => n * d, 1);
const isSizes = (x: unknown): x is number[] => Array.isArray(x) && x.every(n => Number.isSafeInteger(n) && n >= 0);

interface TensorInfo {
  dtype: string;
  shape: readonly number[];
  begin: number; // in bytes from the start of the file
  end: number;
}

export interface SafetensorsFile {
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: ReadonlyMap<string, string>;
  /** From F32, F16, BF16 or F64, in row-major order. */
  readFloat32(name: string): Float32Array;
  readInt32(name: string): Int32Array;
  close(): void;
}

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

function readFully(file: string, fd: number, into: Uint8Array, position: number): void {
  for (let done = 0; done < into.length; ) {
    const n = fs.readSync(fd, into, done, Math.min(into.length - done, 2 ** 30), position + done);
    if (n === 0) refuse(`${file}: ends too early for a safetensors file`);
    done += n;
  }
}

/** Trusts nothing: lengths are checked before anything is allocated from them, and the tensors must cover the data. */
function readHeader(file: string, fd: number, fileBytes: number) {
  const prefix = Buffer.alloc(8);
  readFully(file, fd, prefix, 0);
  const headerBytes = Number(prefix.readBigUInt64LE());
  const dataBegin = 8 + headerBytes;
  if (headerBytes > 100e6 || dataBegin > fileBytes)
    refuse(`${file}: header of ${headerBytes} bytes; at most 100 MB within the file's ${fileBytes} are read`);
  const bytes = new Uint8Array(headerBytes);
  readFully(file, fd, bytes, 8);
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

/** sign, 5 bits of exponent (0: subnormal, 31: infinity and NaN), 10 bits of mantissa */
function halfToFloat(bits: number): number {
  const [sign, exponent, mantissa] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (exponent ? (1024 + mantissa) * 2 ** (exponent - 25) : mantissa * 2 ** -24);
}
let halfFloats: Float32Array | undefined;

/** Opens a safetensors file, its header checked; tensors are read one at a time. Throws UsageError. */
export function openSafetensors(file: string): SafetensorsFile {
  const stat = fs.statSync(file, { throwIfNoEntry: false });
  if (!stat?.isFile()) refuse(`${file}: is not a file; a .safetensors file is expected here`);
  const fd = fs.openSync(file, 'r');
  let header: ReturnType<typeof readHeader>;
  try {
    header = readHeader(file, fd, stat.size);
  } catch (error) {
    fs.closeSync(fd);
    throw error;
  }
  const find = (name: string, accepted: string[]) => {
    const tensor = header.tensors.get(name) ?? refuse(`${file}: has no tensor "${name}"`);
    if (!accepted.includes(tensor.dtype)) refuse(`${file}: "${name}" is ${tensor.dtype}; ${accepted} can be read here`);
    return tensor;
  };
  return {
    ...header,
    readFloat32(name) {
      const { dtype, begin, end } = find(name, ['F32', 'F16', 'BF16', 'F64']);
      const out = new Float32Array((end - begin) / dtypeBytes(dtype));
      const outBits = new Uint32Array(out.buffer);
      if (dtype === 'F32') readFully(file, fd, new Uint8Array(out.buffer), begin);
      if (dtype === 'F16') halfFloats ??= Float32Array.from({ length: 65536 }, (_, bits) => halfToFloat(bits));
      for (let from = begin, at = 0; dtype !== 'F32' && from < end; from += 2 ** 22) {
        const bytes = new Uint8Array(Math.min(2 ** 22, end - from)); // piecewise: no second copy of the tensor
        readFully(file, fd, bytes, from);
        const values = dtype === 'F64' ? new Float64Array(bytes.buffer) : new Uint16Array(bytes.buffer);
        if (dtype === 'F64') out.set(values, at);
        else if (dtype === 'F16') for (let i = 0; i < values.length; i++) out[at + i] = halfFloats![values[i]!]!;
        else for (let i = 0; i < values.length; i++) outBits[at + i] = values[i]! << 16; // BF16: F32's upper half
        at += values.length;
      }
      return out;
    },
    readInt32(name) {
      const { begin, end } = find(name, ['I32']);
      const out = new Int32Array((end - begin) / 4);
      readFully(file, fd, new Uint8Array(out.buffer), begin);
      return out;
    },
    close: () => fs.closeSync(fd),
  };
}

type TensorData = Float32Array | Int32Array;
export interface TensorToWrite {
  name: string;
  shape: readonly number[];
  /** A function is called when the tensor's turn comes, so that only one need be in memory. */
  data: TensorData | (() => TensorData | Promise<TensorData>);
  /** To be given where data is a function that yields an Int32Array. */
  dtype?: 'F32' | 'I32';
}

/** For files, and for folders after a rename, which only then survives a power cut. (Windows has no such call.) */
export function syncToDisk(fileOrFolder: string): void {
  if (process.platform === 'win32') return;
  const fd = fs.openSync(fileOrFolder, 'r');
  fs.fsyncSync(fd);
  fs.closeSync(fd);
}

/**
 * Writes the tensors in their order and returns the file's SHA-256. Under its own name the file is always whole:
 * it is written beside, put on disk, then renamed.
 */
export async function writeSafetensors(
  file: string,
  tensors: Iterable<TensorToWrite>,
  metadata: Readonly<Record<string, string>> = {},
): Promise<string> {
  const list = Array.from(tensors, t => ({ dtype: t.data instanceof Int32Array ? 'I32' : 'F32', ...t }));
  const header: Record<string, unknown> = Object.create(null);
  header.__metadata__ = metadata;
  let end = 0;
  for (const { name, shape, dtype } of list) {
    if (name in header) throw new Error(`${file}: two tensors have the name ${name}`);
    const begin = end;
    end += 4 * sizeOf(shape);
    header[name] = { dtype, shape, data_offsets: [begin, end] };
  }
  const json = Buffer.from(JSON.stringify(header));
  const start = Buffer.alloc(8 + Math.ceil(json.length / 8) * 8, ' '); // spaces, so that the data is aligned
  start.writeBigUInt64LE(BigInt(start.length - 8));
  json.copy(start, 8);

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
    for (const { name, shape, data, dtype } of list) {
      const values = typeof data === 'function' ? await data() : data;
      if (values.length !== sizeOf(shape) || (values instanceof Int32Array ? 'I32' : 'F32') !== dtype)
        throw new Error(`${file}: the data of ${name} is not ${dtype} of shape [${shape}]`);
      write(new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
    }
    fs.fsyncSync(fd);
    fs.renameSync(beside, file);
  } finally {
    fs.closeSync(fd);
    fs.rmSync(beside, { force: true }); // after the rename there is nothing to remove
  }
  syncToDisk(path.dirname(file));
  return hash.digest('hex');
}

/** What a config.json says, in one vocabulary for all architectures. */
export interface Architecture {
  type: string;
  vocab: number;
  dModel: number;
  dMlp: number;
  nLayers: number;
  nHeads: number;
  nKvHeads: number;
  headDim: number;
  /** longest row: the positions that the model has, or its sliding window (up to which attention is plain) */
  context: number;
  contextField: string;
  norm: 'rms' | 'layer';
  eps: number;
  /** inverse wavelength of each rotated pair of a head; undefined: learned positions */
  rotary: Float32Array | undefined;
  qkv: 'separate' | 'concatenated' | 'by head';
  activation: string;
  parallelResidual: boolean;
  /** linear layers that must have a bias; others may */
  biased: RegExp;
  tied: boolean;
  names: Record<Part, string>;
}

/** State-dict names without `.weight`, layer {i}; '' where an architecture lacks the part. `q` is also the fused qkv. */
const PARTS = [
  'embed',
  'positions',
  'norm1',
  'q',
  'k',
  'v',
  'o',
  'norm2',
  'gate',
  'up',
  'down',
  'last',
  'head',
] as const;
type Part = (typeof PARTS)[number];
const BLOCK: Record<string, [outside: string, prefix: string, inside: string]> = {
  llama: [
    'model.embed_tokens - model.norm lm_head',
    'model.layers.{i}.',
    'input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj',
  ],
  llama_simple_mlp: [
    'wte - ln_f lm_head',
    'h.{i}.',
    'rms_1 attn.q_proj attn.k_proj attn.v_proj attn.o_proj rms_2 - mlp.c_fc mlp.down_proj',
  ],
  gpt2: ['wte wpe ln_f lm_head', 'h.{i}.', 'ln_1 attn.c_attn - - attn.c_proj ln_2 - mlp.c_fc mlp.c_proj'],
  gpt_neox: [
    'gpt_neox.embed_in - gpt_neox.final_layer_norm embed_out',
    'gpt_neox.layers.{i}.',
    'input_layernorm attention.query_key_value - - attention.dense post_attention_layernorm - mlp.dense_h_to_4h mlp.dense_4h_to_h',
  ],
};
for (const family of ['mistral', 'qwen2', 'qwen3']) BLOCK[family] = BLOCK.llama!;

function partNames(type: string): Record<Part, string> {
  const [outside, prefix, inside] = BLOCK[type]!;
  const [embed, positions, last, head] = outside.split(' ');
  const block = inside.split(' ').map(name => (name === '-' ? '' : prefix + name));
  const names = [embed!, positions === '-' ? '' : positions!, ...block, last!, head!];
  return Object.fromEntries(PARTS.map((part, i) => [part, names[i]!])) as Record<Part, string>;
}

const geluTanh = (x: T): T => {
  const inner = tf.mul(Math.sqrt(2 / Math.PI), tf.add(x, tf.mul(0.044715, tf.mul(x, tf.mul(x, x)))));
  return tf.mul(tf.mul(0.5, x), tf.add(1, tf.tanh(inner)));
};
const gelu = (x: T): T => tf.mul(tf.mul(0.5, x), tf.add(1, tf.erf(tf.mul(x, Math.SQRT1_2))));
const silu = (x: T): T => tf.mul(x, tf.sigmoid(x));
const ACTIVATIONS: Record<string, (x: T) => T> = { silu, swish: silu, relu: tf.relu, gelu, gelu_python: gelu };
for (const name of ['new', 'pytorch_tanh', 'python_tanh', 'fast', 'accurate']) ACTIVATIONS[`gelu_${name}`] = geluTanh;

/** Fields of a config that ask for something not done here, unless their value is one of these (or absent or null). */
const NOT_DONE: [meaning: string, fields: string, harmless: unknown[]][] = [
  ['quantised weights', 'quantization_config', []],
  ['sliding-window attention', 'use_sliding_window', [false]],
  ['ALiBi or other positions', 'alibi position_embedding_type', [false, 'rope', 'absolute']],
  ['a mixture of experts', 'num_local_experts num_experts n_routed_experts moe_intermediate_size', [0]],
  ['soft-capped logits', 'attn_logit_softcapping final_logit_softcapping logit_softcapping', []],
  ['another rotary embedding', 'rope_interleaved rotary_adjacent_pairs', [false]],
  ['attention other than grouped queries', 'use_grouped_query_attention', [true]],
  ['attention sinks', 'attention_sinks', [false]],
  ['cross-attention or an encoder', 'add_cross_attention is_encoder_decoder', [false]],
  ['another attention scale', 'scale_attn_by_inverse_layer_idx attention_multiplier query_pre_attn_scalar', [false]],
  ['unscaled attention', 'scale_attn_weights', [true]],
  ['clipped q, k, v', 'clip_qkv', []],
  ['scaled streams', 'logits_scaling embedding_multiplier residual_multiplier', [1]],
];

/** Reads a Hugging Face config.json. @throws UsageError naming the field that is wrong or not done here */
export function readArchitecture(config: Record<string, unknown>, file: string): Architecture {
  const wrong = (field: string, takes: string) =>
    refuse(`${file}: ${field} is ${JSON.stringify(config[field]) ?? 'missing'}; ${takes}`);
  const type = String(config.model_type);
  if (!Object.hasOwn(BLOCK, type)) wrong('model_type', `done here are ${Object.keys(BLOCK).join(', ')}`);
  for (const [meaning, fields, harmless] of NOT_DONE) {
    for (const field of fields.split(' ')) {
      if (![undefined, null, ...harmless].includes(config[field] as null)) wrong(field, `${meaning}: not done here`);
    }
  }
  for (const [field, done] of [
    ['layer_types', 'full_attention'],
    ['no_rope_layers', 1],
  ] as const) {
    if (![config[field] ?? []].flat().every(layer => layer === done)) wrong(field, `not done here other than ${done}`);
  }
  const number = (field: string, standard?: number, min = 0, max = 1): number => {
    const value = config[field] ?? standard;
    return typeof value === 'number' && value >= min && value <= max ? value : wrong(field, `takes ${min} to ${max}`);
  };
  const count = (field: string, standard?: number, max = 1 << 24): number => {
    const value = number(field, standard, 1, max);
    return Number.isInteger(value) ? value : wrong(field, 'takes an integer');
  };
  const [gpt2, neox, simple] = [type === 'gpt2', type === 'gpt_neox', type === 'llama_simple_mlp'];
  const dModel = count(gpt2 ? 'n_embd' : 'hidden_size', undefined, 1 << 17);
  const headField = gpt2 ? 'n_head' : 'num_attention_heads';
  const nHeads = count(headField, undefined, 4096);
  const nKvHeads = count('num_key_value_heads', nHeads, 4096);
  if (nHeads % nKvHeads !== 0) wrong('num_key_value_heads', `takes a divisor of the ${nHeads} heads`);
  const headDim = count('head_dim', type === 'qwen3' ? 128 : Math.floor(dModel / nHeads), 4096);
  if (!config.head_dim && type !== 'qwen3' && dModel % nHeads !== 0) wrong(headField, `takes a divisor of ${dModel}`);
  const activationField = gpt2 ? 'activation_function' : 'hidden_act';
  const activation = String(config[activationField] ?? (gpt2 || simple ? 'gelu_new' : neox ? 'gelu' : 'silu'));
  if (!Object.hasOwn(ACTIVATIONS, activation))
    wrong(activationField, `done here: ${Object.keys(ACTIVATIONS).join(', ')}`);
  const positionsField = gpt2 ? 'n_positions' : 'max_position_embeddings';
  const positions = count(positionsField, gpt2 ? 1024 : 2048);
  // absent means 4096 in mistral, null means none
  const window = type === 'mistral' && config.sliding_window !== null ? count('sliding_window', 4096) : Infinity;
  return {
    ...{ type, dModel, nHeads, nKvHeads, headDim, activation, names: partNames(type) },
    vocab: count('vocab_size'),
    dMlp: count(gpt2 ? 'n_inner' : 'intermediate_size', gpt2 ? 4 * dModel : undefined),
    nLayers: count(gpt2 ? 'n_layer' : 'num_hidden_layers', undefined, 4096),
    context: Math.min(positions, window),
    contextField: window < positions ? 'sliding_window' : positionsField,
    norm: gpt2 || neox ? 'layer' : 'rms',
    eps: number(gpt2 ? 'layer_norm_epsilon' : neox ? 'layer_norm_eps' : 'rms_norm_eps', gpt2 || neox ? 1e-5 : 1e-6),
    rotary: gpt2 ? undefined : rotaryFrequencies(config, headDim, positions, file),
    qkv: gpt2 ? 'concatenated' : neox ? 'by head' : 'separate',
    parallelResidual: neox && config.use_parallel_residual !== false,
    biased: biasedLayers(config, type),
    tied: Boolean(config.tie_word_embeddings ?? (gpt2 || simple)),
  };
}

/** gpt2 has biases everywhere, gpt_neox in its MLPs, qwen2 on q, k, v; the rest is as the config says. */
function biasedLayers({ attention_bias, mlp_bias }: Record<string, unknown>, type: string): RegExp {
  if (type === 'gpt2') return /./;
  const neox = type === 'gpt_neox';
  const attention = type === 'qwen2' ? '[qkv]_proj$' : (attention_bias ?? neox) ? '[qkvo]_proj$|\\.attention\\.' : '^$';
  return new RegExp(`${attention}|${mlp_bias || neox ? '\\.mlp\\.' : '^$'}`);
}

/** Inverse wavelengths θ^(−2i/dims), with the `linear` and `llama3` scalings; under the old and the new config keys. */
function rotaryFrequencies(config: Record<string, unknown>, headDim: number, positions: number, file: string) {
  const neox = config.model_type === 'gpt_neox';
  for (const field of ['rope_scaling', 'rope_parameters']) {
    const values = Object.values(config[field] ?? {});
    if (typeof (config[field] ?? {}) !== 'object' || values.some(v => v && typeof v === 'object'))
      refuse(`${file}: ${field} is ${JSON.stringify(config[field])}; takes one record for all layers`);
  }
  const rope: Record<string, unknown> = {
    rope_theta: config.rope_theta ?? config.rotary_emb_base ?? 10_000,
    partial_rotary_factor: config.rotary_pct ?? config.partial_rotary_factor ?? (neox ? 0.25 : 1),
    ...(config.rope_scaling as object | null | undefined),
    ...(config.rope_parameters as object | null | undefined),
  };
  const wrong = (field: string, takes: string) =>
    refuse(`${file}: the rotary ${field} is ${JSON.stringify(rope[field]) ?? 'missing'}; ${takes}`);
  const number = (field: string, min: number): number => {
    const value = rope[field];
    return typeof value === 'number' && value >= min && value < 1e12 ? value : wrong(field, `takes at least ${min}`);
  };
  const kind = rope.rope_type ?? rope.type ?? 'default';
  const kindField = rope.rope_type === undefined ? 'type' : 'rope_type';
  if (!['default', 'linear', 'llama3'].includes(String(kind))) wrong(kindField, 'done here: default, linear, llama3');
  const share = number('partial_rotary_factor', 0);
  if (share > 1 || (!neox && share !== 1)) wrong('partial_rotary_factor', 'partial is done in gpt_neox only');
  const dims = Math.floor(headDim * share);
  if (dims % 2 !== 0) wrong('partial_rotary_factor', `of head_dim ${headDim} it leaves ${dims} dims, an odd number`);
  const theta = number('rope_theta', 1);
  return Float32Array.from({ length: dims / 2 }, (_, i) => {
    const frequency = theta ** ((-2 * i) / dims);
    if (kind === 'default') return frequency;
    const factor = number('factor', 1);
    if (kind === 'linear') return frequency / factor;
    // llama3: long wavelengths are divided by the factor, short ones kept, a linear blend in between
    const [low, high] = [number('low_freq_factor', 0), number('high_freq_factor', 0)];
    rope.original_max_position_embeddings ??= positions;
    const turns = (number('original_max_position_embeddings', 1) * frequency) / (2 * Math.PI);
    const keep = Math.min(1, Math.max(0, (turns - low) / (high - low)));
    return frequency * (keep + (1 - keep) / factor);
  });
}

/** A linear layer of the target's blocks: y = x Wᵀ + b. */
export interface LinearLayer {
  path: string;
  dIn: number;
  dOut: number;
}

/** The frozen network. */
export interface Target {
  readonly arch: Architecture;
  /** every linear layer of the blocks, in network order */
  readonly linears: readonly LinearLayer[];
  /** by state-dict name; a linear layer's Wᵀ [dIn,dOut] under its path. Variables: state of a traced graph */
  readonly weights: ReadonlyMap<string, tf.Variable>;
  readonly dir: string;
  readonly sha256: string;
}
const nameOf = ({ names }: Architecture, part: Part, i = 0) => names[part].replace('{i}', String(i));
const headNorm = (arch: Architecture, part: 'q' | 'k', i: number) =>
  `${nameOf(arch, 'q', i).replace(/[^.]*$/, `${part}_norm`)}.weight`;

/** The linear layers of an architecture's blocks, in network order. */
export function linearLayers(arch: Architecture): LinearLayer[] {
  const { dModel, dMlp, nLayers, nHeads, nKvHeads, headDim } = arch;
  const [dQ, dKv] = [nHeads * headDim, nKvHeads * headDim];
  const sizes: [Part, number, number][] = [
    ['q', dModel, arch.qkv === 'separate' ? dQ : 3 * dQ],
    ...([
      ['k', dModel, dKv],
      ['v', dModel, dKv],
      ['o', dQ, dModel],
    ] as [Part, number, number][]),
    ...([
      ['gate', dModel, dMlp],
      ['up', dModel, dMlp],
      ['down', dMlp, dModel],
    ] as [Part, number, number][]),
  ];
  const has = sizes.filter(([part]) => arch.names[part]);
  const layer = (i: number) => has.map(([part, dIn, dOut]) => ({ path: nameOf(arch, part, i), dIn, dOut }));
  return Array.from({ length: nLayers }, (_, i) => layer(i)).flat();
}

/** Buffers in old checkpoints that no forward needs. */
const IGNORED = /\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias)$/;

/** config.json, or what the original's trainer leaves beside its weights: model_config.yaml, lines of `key: scalar`. */
function readConfig(dir: string): [file: string, config: Record<string, unknown>] {
  const [json, yaml] = [path.join(dir, 'config.json'), path.join(dir, 'model_config.yaml')];
  if (fs.existsSync(json) || !fs.existsSync(yaml)) return [json, readJson(json)];
  const config: Record<string, unknown> = {};
  for (const [, key = '', value = ''] of readText(yaml).matchAll(/^(\w+): *(.*?) *\r?$/gm)) {
    config[YAML_KEYS[key] ?? key] = /^(-?[\d.]+(e-?\d+)?|true|false|null)$/.test(value) ? JSON.parse(value) : value;
  }
  if (config.model_type === 'LlamaSimpleMLP') config.model_type = 'llama_simple_mlp';
  return [yaml, config];
}
const YAML_KEYS: Record<string, string> = {
  ...{ n_embd: 'hidden_size', n_intermediate: 'intermediate_size', n_layer: 'num_hidden_layers' },
  ...{ n_head: 'num_attention_heads', n_key_value_heads: 'num_key_value_heads', n_ctx: 'max_position_embeddings' },
  ...{ rotary_base: 'rope_theta', attn_bias: 'attention_bias' },
};

/** Loads a Hugging Face folder. @throws UsageError naming the file and what is wrong with it */
export function loadTarget(dir: string): Target {
  const [configFile, config] = readConfig(dir);
  const arch = readArchitecture(config, configFile);
  const linears = linearLayers(arch);
  const weights = new Map<string, tf.Variable>();
  const sha256 = crypto.createHash('sha256').update(fs.readFileSync(configFile));
  const files = weightFiles(dir);
  try {
    const where = new Map(files.flatMap(file => [...file.tensors.keys()].map(name => [name, file] as const)));
    const used = new Set<string>();
    // gpt2 is published with and without a prefix, gpt_neox with two names of its head
    const stored = (name: string) =>
      [name, `transformer.${name}`, name.replace('embed_out', 'lm_head')].find(n => where.has(n));
    const load = (name: string, shape: number[], key = name, transposed = false): void => {
      const source = stored(name) ?? refuse(`${dir}: the safetensors files have no tensor ${name}`);
      const file = where.get(source)!;
      const got = file.tensors.get(source)!.shape;
      if (got.join() !== shape.join()) refuse(`${dir}: ${source} is [${got}], config.json implies [${shape}]`);
      used.add(source);
      const data = file.readFloat32(source);
      sha256.update(source).update(data);
      weights.set(key, frozen(data, shape, transposed));
    };
    const loadNorm = (name: string) => {
      load(`${name}.weight`, [arch.dModel]);
      if (arch.norm === 'layer') load(`${name}.bias`, [arch.dModel]);
    };
    load(`${arch.names.embed}.weight`, [arch.vocab, arch.dModel]);
    if (arch.names.positions) load(`${arch.names.positions}.weight`, [arch.context, arch.dModel]);
    for (const { path: name, dIn, dOut } of linears) {
      // nn.Linear stores [dOut,dIn], gpt2's Conv1D [dIn,dOut]; kept as Wᵀ [dIn,dOut]: no transposed product later
      const conv1d = arch.type === 'gpt2';
      load(`${name}.weight`, conv1d ? [dIn, dOut] : [dOut, dIn], name, !conv1d);
      if (arch.biased.test(name) || stored(`${name}.bias`)) load(`${name}.bias`, [dOut]);
    }
    for (let i = 0; i < arch.nLayers; i++) {
      for (const part of ['norm1', 'norm2'] as const) loadNorm(nameOf(arch, part, i));
      if (arch.type === 'qwen3') for (const part of ['q', 'k'] as const) load(headNorm(arch, part, i), [arch.headDim]);
    }
    loadNorm(arch.names.last);
    const head = `${arch.names.head}.weight`;
    if (stored(head)) load(head, [arch.vocab, arch.dModel]);
    else if (!arch.tied) refuse(`${dir}: ${head} is missing and tie_word_embeddings is false`);
    const others = [...where.keys()].filter(name => !used.has(name) && !IGNORED.test(name));
    if (others.length > 0) refuse(`${dir}: ${arch.type} has no use for the tensors ${others.slice(0, 5).join(', ')}`);
  } finally {
    for (const file of files) file.close();
  }
  return { arch, linears, weights, dir, sha256: sha256.digest('hex') };
}

function frozen(data: Float32Array, shape: number[], transposed = false): tf.Variable {
  return tf.tidy(() => {
    const value = tf.tensor(data, shape);
    return tf.variable(transposed ? tf.transpose(value) : value, false);
  });
}

/** model.safetensors, or the shards that its index names, or the paper's own model_step_<n>.safetensors. */
function weightFiles(dir: string): SafetensorsFile[] {
  const all = fs.readdirSync(dir);
  let names: string[] = all.filter(f => f === 'model.safetensors');
  const index = path.join(dir, 'model.safetensors.index.json');
  if (names.length === 0 && fs.existsSync(index)) {
    names = [...new Set(Object.values(readJson(index).weight_map ?? {}).map(String))];
    const odd = names.find(name => !/^[\w-][\w.-]*\.safetensors$/.test(name));
    if (odd !== undefined) refuse(`${index}: ${JSON.stringify(odd)} is not the name of a shard in this folder`);
  }
  if (names.length === 0) names = all.filter(f => /^model_step_\d+\.safetensors$/.test(f));
  if (names.length > 1 && all.includes(names[0]!) && !fs.existsSync(index))
    refuse(`${dir}: several checkpoints, ${names}`);
  if (names.length === 0) refuse(`${dir}: no model.safetensors, and no model.safetensors.index.json`);
  return names.map(name => openSafetensors(path.join(dir, name)));
}

function readText(file: string): string {
  try {
    return fs.readFileSync(file, 'utf8');
  } catch (error) {
    return refuse(`${file}: ${(error as Error).message}`);
  }
}
function parseJson(content: string, where: string): unknown {
  try {
    return JSON.parse(content);
  } catch (error) {
    return refuse(`${where}: ${(error as Error).message}`);
  }
}
function readJson(file: string): Record<string, unknown> {
  const value = parseJson(readText(file), file);
  return typeof value === 'object' && value && !Array.isArray(value)
    ? (value as never)
    : refuse(`${file}: not an object`);
}

/** How a linear layer is computed: by the target itself, or in one of the masked forwards of section E. */
export type Linear = (path: string, x: T<'N dIn'>) => T<'N dOut'>;

const weight = ({ weights }: Target, name: string): tf.Tensor => weights.get(name) ?? refuse(`no weight ${name}`);
/** All products are [N,k] x [k,m]: TFJS's own 3-D x 2-D matMul has no gradient. */
const matmul = (a: T<'n k'>, b: T<'k m'>, transposeB = false): T<'n m'> =>
  tf.matMul(a as tf.Tensor2D, b as tf.Tensor2D, false, transposeB);
const addBias = ({ weights }: Target, name: string, y: T<'N dOut'>): T<'N dOut'> => {
  const bias = weights.get(`${name}.bias`);
  return bias ? tf.add(y, bias) : y;
};
export const ownLinear =
  (target: Target): Linear =>
  (name, x) =>
    addBias(target, name, matmul(x, weight(target, name)));

/**
 * y = x r with r = 1 / √(mean x² + ε) over the last axis. By hand, since TFJS's own gradient takes three times the ops:
 * dx = r (dy − y mean(y dy)).
 */
export const rmsNormalize = (x: T, eps: number): T =>
  tf.customGrad((a, save) => {
    const r = tf.rsqrt(tf.add(tf.mean(tf.square(a as T), -1, true), eps));
    const y = tf.mul(a as T, r);
    (save as tf.GradSaveFunc)([y, r]);
    const gradFunc = (dy: T, [y, r]: T[]) => tf.mul(r!, tf.sub(dy, tf.mul(y!, tf.mean(tf.mul(y!, dy), -1, true))));
    return { value: y, gradFunc };
  })(x);

function norm(target: Target, name: string, x: T<'N d'>): T<'N d'> {
  const { eps } = target.arch;
  if (target.arch.norm === 'rms') return tf.mul(rmsNormalize(x, eps), weight(target, `${name}.weight`));
  const centred = tf.sub(x, tf.mean(x, -1, true));
  return addBias(target, name, tf.mul(rmsNormalize(centred, eps), weight(target, `${name}.weight`)));
}

/** Half-split rotary embedding of the first 2·len(frequencies) dims of each head. x [B,H,S,hd] */
export function rotate(x: T<'B H S hd'>, frequencies: Float32Array): T<'B H S hd'> {
  const [S = 0, headDim = 0] = x.shape.slice(2);
  const half = frequencies.length;
  const angle = tf.mul(tf.range(0, S, 1, 'float32').reshape([S, 1]), tf.tensor2d(frequencies, [1, half])); // [S,half]
  const [cos, sin] = [tf.cos(angle), tf.sin(angle)];
  const rest = headDim - 2 * half;
  const [a, b, ...others] = tf.split(x, rest > 0 ? [half, half, rest] : [half, half], 3) as [T, T, ...T[]];
  return tf.concat([tf.sub(tf.mul(a, cos), tf.mul(b, sin)), tf.add(tf.mul(b, cos), tf.mul(a, sin)), ...others], 3);
}

/** softmax(q kᵀ / √hd) v; with fewer k, v heads (H') than q heads each serves a group. q [B,H,S,hd], k, v [B,H',S,hd] */
function attend(q: T<'B H S hd'>, k: T<'B H S hd'>, v: T<'B H S hd'>, causal: boolean): T<'N d'> {
  const [B = 0, H = 0, S = 0, headDim = 0] = q.shape;
  const kvHeads = k.shape[1]!;
  const rows = (H / kvHeads) * S; // the q heads of a group, one below the other
  const scaled = tf.mul(q, 1 / Math.sqrt(headDim)).reshape([B, kvHeads, rows, headDim]);
  let scores: T = tf.matMul(scaled, k, false, true).reshape([B, H, S, S]);
  if (causal) {
    const position = tf.range(0, S, 1, 'float32');
    const later = tf.cast(tf.greater(position.reshape([1, S]), position.reshape([S, 1])), 'float32');
    scores = tf.add(scores, tf.mul(-1e9, later));
  }
  const mixed = tf.matMul(tf.softmax(scores).reshape([B, kvHeads, rows, S]), v);
  return mixed
    .reshape([B, H, S, headDim])
    .transpose([0, 2, 1, 3])
    .reshape([B * S, H * headDim]);
}

/** [N, H·hd] -> [B,H,S,hd] */
const toHeads = (x: T<'N d'>, B: number, S: number, H: number): T<'B H S hd'> =>
  x.reshape([B, S, H, x.size / (B * S * H)]).transpose([0, 2, 1, 3]);

function targetAttention(target: Target, i: number, h: T<'N d'>, B: number, S: number, linear: Linear): T<'N d'> {
  const { arch, weights } = target;
  const project = (part: Part) => linear(nameOf(arch, part, i), h);
  const { nHeads, nKvHeads } = arch;
  let [q, k, v]: T[] = [];
  if (arch.qkv === 'separate') {
    [q, k, v] = [
      toHeads(project('q'), B, S, nHeads),
      toHeads(project('k'), B, S, nKvHeads),
      toHeads(project('v'), B, S, nKvHeads),
    ];
  } else {
    const qkv = project('q'); // columns: all of q, all of k, all of v; or q, k, v head by head
    const parts = arch.qkv === 'concatenated' ? tf.split(qkv, 3, 1) : tf.split(qkv.reshape([B * S, nHeads, -1]), 3, 2);
    [q, k, v] = parts.map(part => toHeads(part, B, S, nHeads));
  }
  const qNorm = weights.get(headNorm(arch, 'q', i));
  const kNorm = weights.get(headNorm(arch, 'k', i));
  if (qNorm && kNorm) [q, k] = [tf.mul(rmsNormalize(q!, arch.eps), qNorm), tf.mul(rmsNormalize(k!, arch.eps), kNorm)];
  if (arch.rotary) [q, k] = [rotate(q!, arch.rotary), rotate(k!, arch.rotary)];
  return linear(nameOf(arch, 'o', i), attend(q!, k!, v!, true));
}

function targetMlp({ arch }: Target, i: number, h: T<'N d'>, linear: Linear): T<'N d'> {
  const act = ACTIVATIONS[arch.activation]!;
  const up = linear(nameOf(arch, 'up', i), h);
  const hidden = arch.names.gate ? tf.mul(act(linear(nameOf(arch, 'gate', i), h)), up) : act(up);
  return linear(nameOf(arch, 'down', i), hidden);
}

/**
 * The target's logits, every linear layer of its blocks computed by `linear` (default: its own).
 * @param tokens int32 [B,S]
 * @returns logits [N, vocab], N = B·S
 */
export function targetForward(target: Target, tokens: T<'B S'>, linear = ownLinear(target)): T<'N vocab'> {
  const { arch, weights } = target;
  const { embed, positions, last, head } = arch.names;
  const [B = 0, S = 0] = tokens.shape;
  let x: T<'N d'> = tf.gather(weight(target, `${embed}.weight`), tokens.flatten());
  if (positions) {
    const first = tf.slice(weight(target, `${positions}.weight`), [0, 0], [S, arch.dModel]);
    x = tf.add(x.reshape([B, S, arch.dModel]), first).reshape([B * S, arch.dModel]);
  }
  for (let i = 0; i < arch.nLayers; i++) {
    const normed = (part: Part, y: T) => norm(target, nameOf(arch, part, i), y);
    const afterAttention = tf.add(x, targetAttention(target, i, normed('norm1', x), B, S, linear));
    const mlpInput = normed('norm2', arch.parallelResidual ? x : afterAttention);
    x = tf.add(afterAttention, targetMlp(target, i, mlpInput, linear));
  }
  return matmul(norm(target, last, x), weights.get(`${head}.weight`) ?? weight(target, `${embed}.weight`), true);
}

// ---- D. Data --------------------------------------------------------------------------------------------------------

/** Rows of tokens, all of the same length. */
export interface Rows {
  readonly count: number;
  readonly seqLen: number;
  row(i: number): Int32Array;
}
const firstRows = (rows: Rows, n: number): Rows => ({ ...rows, count: Math.min(n, rows.count) });
const range = (from: number, to: number): number[] =>
  Array.from({ length: Math.max(0, to - from) }, (_, i) => from + i);

/** The tokenizer of a model folder; engine/tokenizer.ts repairs what the JavaScript library splits otherwise. */
export async function loadTokenizer(dir: string): Promise<Tokenizer> {
  const repairs = await optional(import('./engine/tokenizer.ts'));
  if (repairs) return repairs.loadTokenizer(dir);
  return new Tokenizer(readJson(path.join(dir, 'tokenizer.json')), { clean_up_tokenization_spaces: false });
}

/**
 * The ids of one document. A tokenizer that adds begin-of-text (or end-of-text) by itself marks the border between
 * documents so; for any other the model's end-of-text id is added, as in training on packed text.
 */
export function documentIds(tokenizer: Tokenizer, document: string, endOfText: number | undefined): number[] {
  const { ids } = tokenizer.encode(document);
  const marks = tokenizer.encode('').ids.length > 0;
  return marks || endOfText === undefined ? ids : [...ids, endOfText];
}

/** Documents of a .txt (a line each, or blank-line separated), .jsonl or .json file, for want of engine/data.ts. */
export function* readDocuments(file: string): Generator<string | number[]> {
  const content = readText(file);
  if (file.endsWith('.json')) yield* parseJson(content, file) as number[][];
  else if (file.endsWith('.jsonl')) {
    for (const line of content.split('\n').filter(line => line.trim())) {
      const { text, input_ids } = parseJson(line, file) as { text?: string; input_ids?: number[] };
      yield text ?? input_ids ?? refuse(`${file}: takes {"text": …} or {"input_ids": […]} lines`);
    }
  } else {
    const blankLine = /\n\s*\n/;
    yield* content.split(blankLine.test(content.trim()) ? blankLine : '\n').filter(text => text.trim());
  }
}

/** The documents of a file or hub data set as checked ids; the row length is that of a .json file's rows, else seqLen. */
async function openData(source: string, target: Target, tokenizer: Tokenizer | undefined, seqLen: number) {
  const { vocab } = target.arch;
  const isRows = source.endsWith('.json');
  const reader = (await optional(import('./engine/data.ts')))?.documents ?? readDocuments;
  // the first document is read here already: what can't be read is refused before anything is written
  for await (const first of reader(source)) {
    if (isRows) seqLen = first.length;
    break;
  }
  // a list of end-of-text ids in some Llamas: the first
  const endOfText = [readConfig(target.dir)[1].eos_token_id].flat()[0];
  const mark = Number.isInteger(endOfText) ? (endOfText as number) : undefined;
  async function* ids(): AsyncGenerator<number[]> {
    for await (const document of reader(source)) {
      if (typeof document === 'string' && !tokenizer) refuse(`${target.dir}: no tokenizer.json, so data must be ids`);
      const found = typeof document === 'string' ? documentIds(tokenizer!, document, mark) : document;
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
function pack(documents: number[][], seqLen: number): Rows {
  const tokens = Int32Array.from(documents.flat());
  const row = (i: number) => tokens.subarray(i * seqLen, (i + 1) * seqLen);
  return { count: Math.floor(tokens.length / seqLen), seqLen, row };
}

export interface Data {
  train: Rows;
  heldOut: Rows;
  tokenizer: Tokenizer | undefined;
}
const HELD_OUT = 0.05;
const FITS_IN_MEMORY = 2 ** 28; // bytes of text; what is larger becomes a file of tokens in the run folder

/** Training rows, and the held-out ones: those of `evalData`, else of the last 5 % of the documents. */
export async function loadData(target: Target, config: Config): Promise<Data> {
  const hasTokenizer = fs.existsSync(path.join(target.dir, 'tokenizer.json'));
  const tokenizer = hasTokenizer ? await loadTokenizer(target.dir) : undefined;
  const held = config.evalData ? await openData(config.evalData, target, tokenizer, config.seqLen) : undefined;
  let heldOut = held && pack(await collect(held.ids), held.seqLen);
  const { ids, seqLen } = await openData(config.data, target, tokenizer, config.seqLen);
  let train: Rows;
  if (fs.existsSync(config.data) && fs.statSync(config.data).size <= FITS_IN_MEMORY) {
    let documents = await collect(ids);
    if (!heldOut && documents.length < 20) {
      const rows = pack(documents, seqLen); // too few documents to spare one: then of the rows
      documents = range(0, rows.count).map(i => [...rows.row(i)]);
    }
    heldOut ??= pack(documents.splice(-Math.max(1, Math.round(documents.length * HELD_OUT))), seqLen);
    train = pack(documents, seqLen);
  } else {
    const parts = (await optional(import('./engine/data.ts'))) ?? refuse(`${config.data}: needs engine/data.ts`);
    fs.mkdirSync(config.out, { recursive: true });
    const enough = config.nSteps * config.batchSize * seqLen * (1 + 2 * HELD_OUT);
    const options = { seqLen, heldOutShare: heldOut ? 0 : HELD_OUT, enough };
    const corpus = await parts.writeCorpus(path.join(config.out, 'tokens.bin'), ids, target.arch.vocab, options);
    heldOut ??= corpus.heldOut;
    train = corpus.train;
  }
  const { context, contextField } = target.arch;
  for (const [file, rows] of [
    [config.data, train],
    [config.evalData || `${config.data}, held out`, heldOut],
  ] as const) {
    if (rows.count < 1) refuse(`${file}: too short for one row of ${rows.seqLen} tokens (--seq-len)`);
    const fits = rows.seqLen >= 2 && rows.seqLen <= context;
    if (!fits) refuse(`${file}: rows of ${rows.seqLen} tokens; takes 2 to ${context} (the target's ${contextField})`);
  }
  return { train, heldOut, tokenizer };
}

/** The given rows as an int32 tensor [B,S]. */
export function tokenBatch(rows: Rows, indices: readonly number[]): tf.Tensor2D {
  const tokens = new Int32Array(indices.length * rows.seqLen);
  for (const [i, index] of indices.entries()) tokens.set(rows.row(index), i * rows.seqLen);
  return tf.tensor2d(tokens, [indices.length, rows.seqLen], 'int32');
}

/** The rows of one training step: each epoch is a new shuffle, a function of (seed, epoch) alone. */
export function batchIndices(count: number, batchSize: number, step: number, seed: number): number[] {
  const positions = range(step * batchSize, (step + 1) * batchSize);
  return positions.map(position => shuffled(count, seed, Math.floor(position / count))[position % count]!);
}
let lastShuffle = { key: '', order: new Uint32Array() };
function shuffled(count: number, seed: number, epoch: number): Uint32Array {
  const key = `${count},${seed},${epoch}`;
  if (lastShuffle.key !== key) {
    const order = Uint32Array.from(range(0, count));
    const draws = uniformArray(count, seed, epoch, PURPOSE.shuffle);
    for (let i = count - 1; i > 0; i--) {
      const j = Math.floor(draws[i]! * (i + 1)); // Fisher-Yates
      [order[i], order[j]] = [order[j]!, order[i]!];
    }
    lastShuffle = { key, order };
  }
  return lastShuffle.order;
}

// ---- E. Components (method 1) ---------------------------------------------------------------------------------------
// Each decomposed weight W [dOut,dIn] becomes a sum of C rank-one matrices, Wᵀ ≈ V U with V [dIn,C] and U [C,dOut];
// what they do not (yet) explain is the delta component Δ = W − (V U)ᵀ.

/** A decomposed linear layer; its components are columns offset … offset + C of every wide tensor. */
export interface Module extends LinearLayer {
  C: number;
  offset: number;
}

/** What stays fixed in a run. */
export interface Problem {
  readonly target: Target;
  /** sorted by path */
  readonly modules: readonly Module[];
  readonly config: Config;
}
export const totalC = (modules: readonly Module[]) => modules.reduce((n, m) => n + m.C, 0);

/** Resolves --components: "pattern=C,…", first match wins, * is any text; "auto" takes all with C = max(dIn, dOut). */
export function chooseModules(linears: readonly LinearLayer[], spec: string): Module[] {
  const rules = (spec === 'auto' ? '*=0' : spec).split(',').map(rule => {
    const [, pattern = '', digits = ''] = /^([\w.*]+)=(\d{1,7})$/.exec(rule.trim()) ?? [];
    const C = Number(digits);
    if (!pattern || (C < 1 && spec !== 'auto'))
      refuse(`--components: got ${rule}, takes pattern=C, as in "*.q_proj=64"`);
    const regex = new RegExp(`^${pattern.replaceAll('.', '\\.').replaceAll('*', '.*')}$`);
    if (linears.some(l => regex.test(l.path))) return { regex, C };
    return refuse(`--components: ${pattern} matches none of ${linears.map(l => l.path).join(', ')}`);
  });
  const modules: Module[] = [];
  let offset = 0;
  for (const layer of [...linears].sort((a, b) => (a.path < b.path ? -1 : 1))) {
    const rule = rules.find(r => r.regex.test(layer.path));
    if (!rule) continue;
    const C = rule.C || Math.max(layer.dIn, layer.dOut);
    modules.push({ ...layer, C, offset });
    offset += C;
  }
  return modules;
}

/** Parameters by their names in components.safetensors: `components.<path>.V`, `.U` and `ci_fn.*`. */
export type Params = Record<string, tf.Variable>;
const V = (params: Tensors, { path }: Module): T<'dIn C'> => params[`components.${path}.V`]!;
const U = (params: Tensors, { path }: Module): T<'C dOut'> => params[`components.${path}.U`]!;

/** What a masked forward lets through, at every position. Wide tensors: module by module side by side. */
export interface Masks {
  mask: T<'N ΣC'>;
  /** mask of the delta components; none: all 0 */
  delta?: T<'N M'>;
  /** 1: the module is computed by its components, 0: by the target's own weight; none: all 1 */
  route?: T<'N M'>;
}

/**
 * The masked linear layers (method 1). With routing r, component mask m and delta mask δ the literal formula is
 *   y = r [ ((x V) ⊙ m) U + δ (x Δᵀ) ] + (1 − r) x Wᵀ + b,   Δᵀ = Wᵀ − V U.
 * Putting Δᵀ in and collecting (x V) U and x Wᵀ gives the same without ever forming Δ:
 *   y = ((x V) ⊙ a) U + s ⊙ (x Wᵀ) + b,   a = r (m − δ),   s = 1 − r (1 − δ).
 */
export function maskedLinear({ target, modules }: Problem, params: Tensors, masked: Masks): Linear {
  const { mask, delta, route } = masked;
  const index = new Map(modules.map((m, i) => [m.path, i]));
  const columns = (x: T<'N M'>) => tf.split(x, modules.length, 1);
  const sizes = modules.map(m => m.C);
  const masks = tf.split(mask, sizes, 1);
  const [deltas, routes] = [delta && columns(delta), route && columns(route)];
  const kept = route ? columns(tf.sub(1, tf.mul(route, tf.sub(1, delta ?? 0)))) : deltas; // s
  const own = ownLinear(target);
  return (name, x) => {
    const i = index.get(name);
    if (i === undefined) return own(name, x);
    const [m, δ, r] = [masks[i]!, deltas?.[i], routes?.[i]];
    let a: T<'N C'> = δ ? tf.sub(m, δ) : m;
    if (r) a = tf.mul(r, a);
    const inner = tf.mul(matmul(x, V(params, modules[i]!)), a);
    const y = matmul(inner, U(params, modules[i]!));
    if (!kept) return addBias(target, name, y); // s = 0
    return addBias(target, name, tf.add(y, tf.mul(kept[i]!, matmul(x, weight(target, name)))));
  };
}

/** The target's logits [N, vocab] with its decomposed layers masked. */
export function maskedLogits(problem: Problem, params: Tensors, tokens: T<'B S'>, masks: Masks): T<'N vocab'> {
  return targetForward(problem.target, tokens, maskedLinear(problem, params, masks));
}

/** The target's own forward, which everything else is measured against. */
export interface TargetPass {
  tokens: T<'B S'>;
  /** pre-weight activation of every linear layer */
  acts: Record<string, T<'N dIn'>>;
  outputs: Record<string, T<'N dOut'>>;
  logProbs: T<'N vocab'>;
  probs: T<'N vocab'>;
}
export function targetPass(target: Target, tokens: T<'B S'>): TargetPass {
  const [acts, outputs]: [TargetPass['acts'], TargetPass['outputs']] = [{}, {}];
  const own = ownLinear(target);
  const logits = targetForward(target, tokens, (name, x) => {
    acts[name] = x;
    outputs[name] = own(name, x);
    return outputs[name];
  });
  const logProbs = tf.logSoftmax(logits);
  return { tokens, acts, outputs, logProbs, probs: tf.exp(logProbs) };
}

// ---- F. CI function (method 2) --------------------------------------------------------------------------------------
// One bidirectional transformer reads what enters every module and says, per position, how causally important each
// component is.

const FLOAT32_EPSILON = 1.1920929e-7;

/** Its shapes in PyTorch's layout [out,in], by name, in the order of components.safetensors. */
export function ciShapes({ modules, config }: Problem): Record<string, number[]> {
  const d = config.ciDModel;
  const sumIn = modules.reduce((n, m) => n + m.dIn, 0);
  const shapes: Record<string, number[]> = { 'ci_fn.proj_in.weight': [d, sumIn], 'ci_fn.proj_in.bias': [d] };
  for (let i = 0; i < config.ciNBlocks; i++) {
    const block = `ci_fn.blocks.${i}`;
    for (const p of 'qkvo') shapes[`${block}.attn.${p}_proj.weight`] = [d, d];
    shapes[`${block}.mlp.0.weight`] = [config.ciMlpHidden, d];
    shapes[`${block}.mlp.0.bias`] = [config.ciMlpHidden];
    shapes[`${block}.mlp.2.weight`] = [d, config.ciMlpHidden];
    shapes[`${block}.mlp.2.bias`] = [d];
  }
  shapes['ci_fn.proj_out.weight'] = [totalC(modules), d];
  shapes['ci_fn.proj_out.bias'] = [totalC(modules)];
  return shapes;
}

/** Its input: every module's activation, RMS-normed without a learned scale, side by side. */
export function ciInput({ modules }: Problem, { acts }: TargetPass): T<'N ΣdIn'> {
  const normed = modules.map(m => rmsNormalize(acts[m.path]!, FLOAT32_EPSILON));
  return tf.concat(normed, 1);
}

/** Logits z [N, ΣC] of causal importance. */
export function ciLogits({ config }: Problem, params: Tensors, input: T<'N ΣdIn'>, S: number): T<'N ΣC'> {
  const linear = (name: string, x: T): T => {
    const y = matmul(x, params[`ci_fn.${name}.weight`]!, true);
    const bias = params[`ci_fn.${name}.bias`];
    return bias ? tf.add(y, bias) : y;
  };
  const B = input.shape[0]! / S;
  const headDim = config.ciDModel / config.ciNHeads;
  const frequencies = Float32Array.from(range(0, headDim / 2), i => config.ciRopeBase ** ((-2 * i) / headDim));
  let x: T<'N d'> = linear('proj_in', input);
  for (let i = 0; i < config.ciNBlocks; i++) {
    let h: T<'N d'> = rmsNormalize(x, FLOAT32_EPSILON);
    const heads = (p: string) => toHeads(linear(`blocks.${i}.attn.${p}_proj`, h), B, S, config.ciNHeads);
    const mixed = attend(rotate(heads('q'), frequencies), rotate(heads('k'), frequencies), heads('v'), false);
    x = tf.add(x, linear(`blocks.${i}.attn.o_proj`, mixed));
    h = rmsNormalize(x, FLOAT32_EPSILON);
    x = tf.add(x, linear(`blocks.${i}.mlp.2`, gelu(linear(`blocks.${i}.mlp.0`, h))));
  }
  return linear('proj_out', x);
}

const indicator = (condition: T): T => tf.cast(condition, 'float32');

/**
 * The lower-leaky hard sigmoid g = clamp(z, 0, 1), which builds masks (method 2). Its gradient is made by hand: the
 * upstream gradient where 0 < z ≤ 1; α times it where z ≤ 0 and it would push z up, so that a dead component can be
 * revived and is never pushed deeper; 0 elsewhere.
 */
export const lowerLeaky = (z: T<'N ΣC'>, alpha: number): T<'N ΣC'> =>
  tf.customGrad((x, save) => {
    (save as tf.GradSaveFunc)([x as T]);
    return {
      value: tf.clipByValue(x as T, 0, 1),
      gradFunc: (dy: T, [saved]: T[]) => {
        const inside = indicator(tf.logicalAnd(tf.greater(saved!, 0), tf.lessEqual(saved!, 1)));
        const below = tf.mul(alpha, indicator(tf.lessEqual(saved!, 0)));
        return tf.add(tf.mul(dy, inside), tf.mul(tf.minimum(dy, 0), below));
      },
    };
  })(z);

/** The upper-leaky hard sigmoid g⁺: clamp(z, 0, 1) up to 1 and 1 + α (z − 1) above; enters the importance loss. */
export const upperLeaky = (z: T<'N ΣC'>, alpha: number): T<'N ΣC'> =>
  tf.add(tf.clipByValue(z, 0, 1), tf.mul(alpha, tf.relu(tf.sub(z, 1))));

/** The target's forward on tokens [B,S], and the importances that the CI function reads off it. */
export function importances(problem: Problem, params: Tensors, tokens: T<'B S'>) {
  const [B = 0, S = 0] = tokens.shape;
  const pass = targetPass(problem.target, tokens);
  const input = ciInput(problem, pass);
  const z = ciLogits(problem, params, input, S);
  return { pass, input, z, g: lowerLeaky(z, problem.config.leakyAlpha), N: B * S, S };
}

// ---- G. Losses (method 3) -------------------------------------------------------------------------------------------

/** Σ ‖Δ‖² / Σ numel(Δ) over all modules: with everything on, the parts must add up to the target. */
export function faithfulnessLoss({ target, modules }: Problem, params: Tensors): tf.Scalar {
  const squares = modules.map(m =>
    tf.sum(tf.square(tf.sub(weight(target, m.path), matmul(V(params, m), U(params, m))))),
  );
  const numel = modules.reduce((n, m) => n + m.dIn * m.dOut, 0);
  return tf.div(tf.addN(squares), numel);
}

/**
 * Σ_c [ μ_c + β μ_c log2(1 + R σ_c) ],  σ_c = Σ over positions of (g⁺ + ε)^p,  μ_c = σ_c / N: few components at each
 * position (p < 1 prefers exact zeros), and above that rarely used ones. R: equal shards that the batch was split into.
 */
export function importanceLoss(gUpper: T<'N ΣC'>, p: T, config: Config, R = config.microBatches): tf.Scalar {
  // ε: the slope of g^p at 0 is infinite when p < 1
  // x^p as exp(p ln x): TensorFlow's CPU pow goes number by number, twenty times slower
  const sigma = tf.sum(tf.exp(tf.mul(p, tf.log(tf.add(gUpper, config.impEps)))), 0);
  const mu = tf.div(sigma, gUpper.shape[0]!);
  const log2 = tf.mul(tf.log(tf.add(1, tf.mul(R, sigma))), Math.LOG2E);
  return tf.sum(tf.mul(mu, tf.add(1, tf.mul(config.impBeta, log2))));
}

/** Mean over positions of KL(target ‖ prediction), in nats. By hand, d logits = (softmax(logits) − target) / N. */
export const klLoss = ({ probs, logProbs }: TargetPass, logits: T<'N vocab'>): T =>
  tf.customGrad((x, save) => {
    const predicted = tf.logSoftmax(x as T);
    (save as tf.GradSaveFunc)([predicted]);
    const N = predicted.shape[0]!;
    const gradFunc = (dy: T, [log]: T[]) => tf.mul(tf.sub(tf.exp(log!), probs), tf.div(dy, N));
    return { value: tf.div(tf.sum(tf.mul(probs, tf.sub(logProbs, predicted))), N), gradFunc };
  })(logits);

/** g + (1 − g) u: a component may be removed exactly as far as its importance allows. */
export const interpolate = (g: T<'N ΣC'>, u: T<'N ΣC'>): T<'N ΣC'> => tf.add(g, tf.mul(tf.sub(1, g), u));

/**
 * Routing for the stochastic loss: at each position k uniform in {1..M}, and a uniformly random k-subset of the
 * modules goes through components: those of the k largest among M uniform numbers.
 */
export function randomRouting(draws: T<'N M'>, countDraw: T<'N 1'>): T<'N M'> {
  const M = draws.shape[1]!;
  const rank = tf.cast(tf.floor(tf.mul(countDraw, M)), 'int32').flatten(); // k − 1
  const sorted = tf.topk(draws, M).values;
  const kth = tf.sum(tf.mul(sorted, tf.oneHot(rank as tf.Tensor1D, M)), 1, true);
  return indicator(tf.greaterEqual(draws, kth));
}

/** The random part of the stochastic reconstruction loss. */
export interface Draws {
  u: T<'N ΣC'>;
  delta: T<'N M'>;
  route: T<'N M'>;
}
export function stochasticDraws({ modules }: Problem, N: number, key: T): Draws {
  const M = modules.length;
  return {
    u: uniform([N, totalC(modules)], key, PURPOSE.mask),
    delta: uniform([N, M], key, PURPOSE.delta),
    route: randomRouting(uniform([N, M], key, PURPOSE.route), uniform([N, 1], key, PURPOSE.routeCount)),
  };
}

/** KL with random masks, a random part of the modules routed through their components. */
export function stochasticLoss(problem: Problem, params: Tensors, pass: TargetPass, g: T<'N ΣC'>, draws: Draws): T {
  return klLoss(pass, maskedLogits(problem, params, pass.tokens, { ...draws, mask: interpolate(g, draws.u) }));
}

/** KL with the adversary's masks: sources [N, ΣC + M], the last M columns are the delta masks. No routing. */
export function adversarialLoss(problem: Problem, params: Tensors, pass: TargetPass, g: T<'N ΣC'>, sources: T): T {
  const [s, delta] = tf.split(sources, [totalC(problem.modules), problem.modules.length], 1) as [T, T];
  return klLoss(pass, maskedLogits(problem, params, pass.tokens, { mask: interpolate(g, s), delta }));
}

// ---- H. Persistent PGD (method 4) -----------------------------------------------------------------------------------
// The adversary's sources persist from step to step, so it finds in thousands of steps what a fresh one would in many
// steps each time.

/** One Adam step's direction m̂ / (√v̂ + ε) with the new moments. c1, c2 = 1 − β1ᵗ, 1 − β2ᵗ undo the moments' start at 0. */
export function adam(grad: T, m: T, v: T, betas: { beta1: number; beta2: number; eps: number }, c1: T, c2: T) {
  const { beta1, beta2, eps } = betas;
  const newM = tf.add(tf.mul(m, beta1), tf.mul(grad, 1 - beta1));
  const newV = tf.add(tf.mul(v, beta2), tf.mul(tf.square(grad), 1 - beta2));
  // the same, with c1 and c2 moved into factors that are scalars
  const root = tf.sqrt(c2);
  const direction = tf.div(tf.mul(newM, tf.div(root, c1)), tf.add(tf.sqrt(newV), tf.mul(eps, root)));
  return { direction, m: newM, v: newV };
}

/** The sources of one shard of the batch with the moments of their Adam; sources [N, ΣC + M] in [0, 1]. */
export interface Sources {
  s: T;
  m: T;
  v: T;
}

/** One ascent step of the adversary, clamped to [0, 1]. */
export function ascend({ s, m, v }: Sources, grad: T, config: Config, lr: T, c1: T, c2: T): Sources {
  const betas = { beta1: config.ppgdBeta1, beta2: config.ppgdBeta2, eps: config.ppgdEps };
  const step = adam(grad, m, v, betas, c1, c2);
  return { s: tf.clipByValue(tf.add(s, tf.mul(lr, step.direction)), 0, 1), m: step.m, v: step.v };
}

// ---- I. Optimisation (method 5) -------------------------------------------------------------------------------------

const MAIN_BETAS = { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

/** Cosine from 1 to `finalFrac`; progress reaches 1 at the last step. */
export function cosine(step: number, nSteps: number, finalFrac: number): number {
  const progress = nSteps > 1 ? step / (nSteps - 1) : 0;
  return finalFrac + (1 - finalFrac) * 0.5 * (1 + Math.cos(Math.PI * progress));
}

/** Everything that changes with the step by a rule: learning rates, p, and the bias corrections of both Adams. */
export function schedule(config: Config, step: number) {
  const { nSteps, ppgdInnerSteps } = config;
  const warmup = Math.floor(config.ppgdWarmupPct * nSteps);
  const ppgd = step < warmup ? step / warmup : cosine(step - warmup, nSteps - warmup, config.ppgdLrFinalFrac);
  const progress = nSteps > 1 ? step / (nSteps - 1) : 0;
  // the adversary's counter t goes up by its inner steps and the one after the main update
  const t = Array.from({ length: ppgdInnerSteps + 1 }, (_, k) => step * (ppgdInnerSteps + 1) + k + 1);
  return {
    lrMain: config.mainLr * cosine(step, nSteps, config.mainLrFinalFrac),
    lrPpgd: config.ppgdLr * ppgd,
    p: config.pStart + (config.pEnd - config.pStart) * progress,
    c1: 1 - MAIN_BETAS.beta1 ** (step + 1),
    c2: 1 - MAIN_BETAS.beta2 ** (step + 1),
    ppgdC1: t.map(n => 1 - config.ppgdBeta1 ** n),
    ppgdC2: t.map(n => 1 - config.ppgdBeta2 ** n),
  };
}

/** What a training step reads and changes: all tf.Variables, so that a traced graph keeps them on the device. */
export interface State {
  params: Params;
  /** Adam's moments: one vector for all of a group, so that Adam is a few large ops and not many small ones */
  m: Record<Group, tf.Variable>;
  v: Record<Group, tf.Variable>;
  /** [batchSize·S, ΣC + M] each */
  sources: { s: tf.Variable; m: tf.Variable; v: tf.Variable };
  /** gradients averaged over the shards of a batch, in the same order as the moments */
  summed: Record<Group, tf.Variable>;
}
/** V and U, and the CI function: clipped separately. */
const GROUPS_OF_PARAMS = ['components', 'ci_fn'] as const;
type Group = (typeof GROUPS_OF_PARAMS)[number];
const namesOf = (params: Tensors, group: Group) => Object.keys(params).filter(name => name.startsWith(group));
const ofGroups = <X>(make: (group: Group) => X) =>
  Object.fromEntries(GROUPS_OF_PARAMS.map(group => [group, make(group)])) as Record<Group, X>;

/** The feeds of one step (or of one shard of it). */
type AdamFeeds = Record<'lrMain' | 'c1' | 'c2', T>;
export type StepFeeds = AdamFeeds & {
  tokens: T<'B S'>; // int32
  key: T; // randomKey, int32 [2]
  p: T;
  lrPpgd: T;
  ppgdC1: T; // [inner + 1]
  ppgdC2: T;
};

const LOSSES = ['faith', 'imp', 'stoch', 'ppgd'] as const;

/**
 * Losses and gradients of one batch (or shard), and the adversary's moves: `ppgdInnerSteps` before, one after.
 * @returns losses [4] in the order of LOSSES, gradients by parameter name, the sources afterwards, L0 (mean number of
 *   components with g > ciAliveThreshold)
 */
export function lossesAndGradients(
  problem: Problem,
  params: Tensors,
  before: Sources,
  feeds: StepFeeds,
  given?: Draws,
) {
  const { config } = problem;
  const { lrPpgd } = feeds;
  const { pass, input, z, g, N, S } = importances(problem, params, feeds.tokens);
  const draws = given ?? stochasticDraws(problem, N, feeds.key);
  const [c1, c2] = [tf.unstack(feeds.ppgdC1), tf.unstack(feeds.ppgdC2)];

  let sources = before;
  if (config.coeffPpgd > 0) {
    for (let k = 0; k < config.ppgdInnerSteps; k++) {
      const [grad] = tf.grads(s => adversarialLoss(problem, params, pass, g, s))([sources.s]);
      sources = ascend(sources, grad!, config, lrPpgd, c1[k]!, c2[k]!);
    }
  }

  // z is a leaf here: the losses are differentiated down to it, then the CI function, with dz as upstream gradient
  const losses = () => {
    const gLower = lowerLeaky(z, config.leakyAlpha);
    return tf.stack([
      faithfulnessLoss(problem, params),
      importanceLoss(upperLeaky(z, config.leakyAlpha), feeds.p, config),
      stochasticLoss(problem, params, pass, gLower, draws),
      adversarialLoss(problem, params, pass, gLower, sources.s),
    ]);
  };
  const names = namesOf(params, 'components');
  // total = Σ coefficient × loss, so the coefficients are the upstream gradient of the vector of losses
  const coefficients = tf.tensor1d([config.coeffFaith, config.coeffImp, config.coeffStoch, config.coeffPpgd]);
  const leaves = [...names.map(n => params[n]!), z, sources.s];
  const { value, grads } = tf.valueAndGrads(losses)(leaves, coefficients);
  const [dz, dSources] = grads.splice(names.length) as [T, T];
  const gradients: Tensors = Object.fromEntries(names.map((n, i) => [n, grads[i]!]));
  const ciNames = namesOf(params, 'ci_fn');
  const ciLeaves = ciNames.map(n => params[n]!);
  const ciGradients = tf.grads(() => ciLogits(problem, params, input, S))(ciLeaves, dz);
  for (const [i, n] of ciNames.entries()) gradients[n] = ciGradients[i]!;

  if (config.coeffPpgd > 0) {
    // the adversary's third move needs no backward pass of its own: its gradient is in the total's
    const k = config.ppgdInnerSteps;
    sources = ascend(sources, tf.div(dSources, config.coeffPpgd), config, lrPpgd, c1[k]!, c2[k]!);
  }
  const l0 = tf.div(tf.sum(indicator(tf.greater(g, config.ciAliveThreshold))), N);
  return { losses: value, gradients, sources, l0 };
}

/** The gradients of each group side by side in one vector. */
export const flatten = (gradients: Tensors) =>
  ofGroups(group => tf.concat(namesOf(gradients, group).map(name => gradients[name]!.flatten())));

/** min(1, limit / norm), with the 1e-6 of torch.nn.utils.clip_grad_norm_; limit 0 = off. */
const clipFactor = (norm: T, limit: number): T =>
  limit > 0 ? tf.minimum(1, tf.div(limit, tf.add(norm, 1e-6))) : tf.onesLike(norm);

/** AdamW with weight decay 0: moves a group's parameters and its moments. */
function adamUpdate(state: State, group: Group, gradient: T<'n'>, { lrMain, c1, c2 }: AdamFeeds): void {
  const step = adam(gradient, state.m[group], state.v[group], MAIN_BETAS, c1, c2);
  const params = namesOf(state.params, group).map(name => state.params[name]!);
  const sizes = params.map(param => param.size);
  const moves = tf.split(tf.mul(lrMain, step.direction), sizes);
  for (const [i, param] of params.entries()) param.assign(tf.sub(param, moves[i]!.reshape(param.shape)));
  state.m[group].assign(step.m);
  state.v[group].assign(step.v);
}

/** Clips the gradients and moves every parameter. @returns the norms before clipping */
export function applyGradients({ config }: Problem, state: State, gradients: Record<Group, T>, feeds: AdamFeeds) {
  const norms = ofGroups(group => tf.sqrt(tf.sum(tf.square(gradients[group]))));
  // a gradient that is not finite moves nothing, so that the parameters can still be looked at when the run stops
  const finite = tf.isFinite(tf.add(norms.components, norms.ci_fn));
  const lrMain = tf.where(finite, feeds.lrMain, tf.scalar(0));
  const limits = { components: config.gradClipComponents, ci_fn: config.gradClipCi };
  for (const group of GROUPS_OF_PARAMS) {
    const clipped = tf.mul(gradients[group], clipFactor(norms[group], limits[group]));
    adamUpdate(state, group, tf.where(finite, clipped, tf.zerosLike(clipped)), { ...feeds, lrMain });
  }
  return norms;
}

/** What a compiled step returns, in order. */
const STEP_METRICS = [
  ...LOSSES.map(l => `loss/${l}`),
  ...['loss/total', 'train/l0', 'grad_norm/components', 'grad_norm/ci_fn'],
];

function stepMetrics(config: Config, losses: T, l0: T, norms: Record<Group, T>): T {
  const coefficients = [config.coeffFaith, config.coeffImp, config.coeffStoch, config.coeffPpgd];
  const total = tf.sum(tf.mul(losses, coefficients));
  return tf.concat([losses, tf.stack([total, l0, norms.components, norms.ci_fn])]);
}

/** The feeds of a step that are the same for all of its shards. */
function scheduleFeeds(config: Config, step: number): Omit<StepFeeds, 'tokens' | 'key'> {
  const { ppgdC1, ppgdC2, ...scalars } = schedule(config, step);
  const feeds = Object.entries(scalars).map(([name, value]) => [name, tf.scalar(value)]);
  return { ...Object.fromEntries(feeds), ppgdC1: tf.tensor1d(ppgdC1), ppgdC2: tf.tensor1d(ppgdC2) };
}

/**
 * Compiles the training step: moves the state on and resolves to STEP_METRICS. With microBatches = R > 1 the batch
 * comes in R shards, one after another; each has its own rows of the sources, and their gradients are averaged.
 */
export function compileStep(engine: Engine, problem: Problem, state: State) {
  const { config } = problem;
  const { s, m, v } = state.sources;
  const R = config.microBatches;
  const n = s.shape[0]! / R; // positions of a shard

  const whole = engine.compile('step', (feeds: StepFeeds) => {
    const { losses, gradients, sources, l0 } = lossesAndGradients(problem, state.params, { s, m, v }, feeds);
    s.assign(sources.s);
    m.assign(sources.m);
    v.assign(sources.v);
    const norms = applyGradients(problem, state, flatten(gradients), feeds);
    return { metrics: stepMetrics(config, losses, l0, norms) };
  });
  const shard = engine.compile('shard', ({ index, ...feeds }: StepFeeds & { index: T }) => {
    const rows = tf.add(tf.range(0, n, 1, 'int32'), tf.mul(index, tf.scalar(n, 'int32'))) as tf.Tensor1D;
    const mine = { s: tf.gather(s, rows), m: tf.gather(m, rows), v: tf.gather(v, rows) };
    const { losses, gradients, sources, l0 } = lossesAndGradients(problem, state.params, mine, feeds);
    const put = (all: tf.Variable, part: T) => all.assign(tf.tensorScatterUpdate(all, rows.reshape([n, 1]), part));
    put(s, sources.s);
    put(m, sources.m);
    put(v, sources.v);
    const flat = flatten(gradients);
    for (const group of GROUPS_OF_PARAMS) {
      state.summed[group].assign(tf.add(state.summed[group], tf.div(flat[group], R)));
    }
    return { losses: tf.div(losses, R), l0: tf.div(l0, R) };
  });
  const update = engine.compile('update', ({ losses, l0, ...feeds }: AdamFeeds & Record<'losses' | 'l0', T>) => {
    const norms = applyGradients(problem, state, state.summed, feeds);
    for (const sum of Object.values(state.summed)) sum.assign(tf.zerosLike(sum));
    return { metrics: stepMetrics(config, losses, l0, norms) };
  });

  return (step: number, data: Rows): Promise<Float32Array> =>
    tidyAsync(async () => {
      const rows = batchIndices(data.count, config.batchSize, step, config.seed);
      const shared = scheduleFeeds(config, step);
      const feeds = (r: number) => ({
        ...{ ...shared, key: randomKey(config.seed, step * R + r) },
        tokens: tokenBatch(data, rows.slice((r * rows.length) / R, ((r + 1) * rows.length) / R)),
      });
      if (R === 1) return numbers((await whole(feeds(0))).metrics);
      let [losses, l0]: [T, T] = [tf.zeros([LOSSES.length]), tf.scalar(0)];
      for (let r = 0; r < R; r++) {
        const part = await shard({ ...feeds(r), index: tf.scalar(r, 'int32') });
        [losses, l0] = [tf.add(losses, part.losses), tf.add(l0, part.l0)];
      }
      const { lrMain, c1, c2 } = shared;
      return numbers((await update({ losses, l0, lrMain, c1, c2 })).metrics);
    });
}

/** What a training step takes, before anything is allocated: parameters, bytes (about) and floating-point operations. */
export function estimate({ target, modules, config }: Problem) {
  const { vocab, dModel } = target.arch;
  const sum = (of: (m: Module) => number) => modules.reduce((n, m) => n + of(m), 0);
  const [sumC, N, R] = [totalC(modules), config.batchSize * config.seqLen, config.microBatches];
  const targetParams = [...target.weights.values()].reduce((n, w) => n + w.size, 0);
  const components = sum(m => m.C * (m.dIn + m.dOut));
  const ciFn = Object.values(ciShapes({ target, modules, config })).reduce((n, s) => n + tf.util.sizeFromShape(s), 0);
  const params = components + ciFn;
  const state = targetParams + params * (R > 1 ? 4 : 3) + 3 * N * (sumC + modules.length);
  const ciActs =
    config.ciNBlocks * (16 * config.ciDModel + 5 * config.ciMlpHidden + 4 * config.ciNHeads * config.seqLen);
  const working = (N / R) * (40 * sumC + 12 * vocab + 40 * sum(m => m.dIn + m.dOut) + ciActs) + 3 * params;
  // forward 1, backward to the masks 1, to V and U 1 more: each inner step takes 2, each of two losses 3
  const passes = config.ppgdInnerSteps + 2;
  const perPosition =
    components * (2 * passes + 2) +
    sum(m => m.dIn * m.dOut) * (2 * passes + 1) +
    dModel * vocab * (2 * passes + 1) +
    3 * ciFn;
  const flops = 2 * N * perPosition + 6 * sum(m => m.dIn * m.dOut * m.C);
  return { targetParams, components, ciFn, bytes: 4 * (state + working), flops };
}

/** V ~ N(0, 1/dIn), U ~ N(0, 1/C); the CI function as PyTorch's nn.Linear: uniform ±1/√fan_in, biases too. */
export function initialParams(problem: Problem): Params {
  const { modules, config } = problem;
  const params: Params = {};
  let purpose = PURPOSE.init;
  const draws = (n: number) => uniformArray(n, config.seed, 0, purpose++);
  const normal = (shape: number[], deviation: number) => {
    const [u, w] = [draws(tf.util.sizeFromShape(shape)), draws(tf.util.sizeFromShape(shape))]; // Box-Muller
    const value = (i: number) => deviation * Math.sqrt(-2 * Math.log(1 - u[i]!)) * Math.cos(2 * Math.PI * w[i]!);
    return frozen(
      u.map((_, i) => value(i)),
      shape,
    );
  };
  for (const { path: name, dIn, dOut, C } of modules) {
    params[`components.${name}.V`] = normal([dIn, C], 1 / Math.sqrt(dIn));
    params[`components.${name}.U`] = normal([C, dOut], 1 / Math.sqrt(C));
  }
  const shapes = ciShapes(problem);
  for (const [name, shape] of Object.entries(shapes)) {
    const bound = 1 / Math.sqrt(shapes[name.replace(/bias$/, 'weight')]![1]!);
    const values = draws(tf.util.sizeFromShape(shape)).map(u => bound * (2 * u - 1));
    params[name] = frozen(values, shape);
  }
  return params;
}

const zeros = (shape: number[]): tf.Variable => tf.tidy(() => tf.variable(tf.zeros(shape), false));
/** The state of step 0: moments 0, sources U(0, 1). */
export function initialState({ modules, config }: Problem, params: Params): State {
  const shape = [config.batchSize * config.seqLen, totalC(modules) + modules.length];
  const s = frozen(uniformArray(shape[0]! * shape[1]!, config.seed, 0, PURPOSE.sources), shape);
  const sources = { s, m: zeros(shape), v: zeros(shape) };
  const sizes = ofGroups(group => namesOf(params, group).reduce((n, name) => n + params[name]!.size, 0));
  const summed = ofGroups(group => zeros([config.microBatches > 1 ? sizes[group] : 0]));
  return { params, m: ofGroups(g => zeros([sizes[g]])), v: ofGroups(g => zeros([sizes[g]])), sources, summed };
}

/** Faithfulness warm-up: AdamW on V and U alone, from moments 0, which it leaves at 0. */
export async function warmUp(
  engine: Engine,
  problem: Problem,
  state: State,
  goOn: (done: number, loss: number) => Promise<boolean>,
) {
  const { config } = problem;
  const steps = config.faithfulnessWarmupSteps;
  const leaves = namesOf(state.params, 'components').map(name => state.params[name]!);
  const step = engine.compile('warm-up', (feeds: AdamFeeds) => {
    const loss = () => faithfulnessLoss(problem, state.params);
    const { value, grads } = tf.valueAndGrads(loss)(leaves);
    adamUpdate(state, 'components', tf.concat(grads.map(grad => grad.flatten())), feeds);
    return { loss: value };
  });
  for (let i = 0; i < steps; i++) {
    const lr = config.faithfulnessWarmupLr * cosine(i, steps, config.faithfulnessWarmupLrFinalFrac);
    const [c1, c2] = [1 - MAIN_BETAS.beta1 ** (i + 1), 1 - MAIN_BETAS.beta2 ** (i + 1)];
    const feeds = () => ({ lrMain: tf.scalar(lr), c1: tf.scalar(c1), c2: tf.scalar(c2) });
    const [loss] = await tidyAsync(async () => numbers((await step(feeds())).loss));
    if (!(await goOn(i + 1, loss!))) return;
  }
  for (const moment of [state.m.components, state.v.components]) tf.tidy(() => moment.assign(tf.zerosLike(moment)));
}

// ---- J. Evaluation (method 6) ---------------------------------------------------------------------------------------

/** Metric names to numbers, as in metrics.jsonl. */
export type Metrics = Record<string, number>;

/** Below this mean importance a component counts as dead. */
const DEAD_BELOW = 1e-6;

/** Mean next-token cross-entropy in nats; the last position of a row predicts nothing. */
export function crossEntropy(logProbs: T<'N vocab'>, tokens: T<'B S'>): T {
  const [B = 0, S = 0] = tokens.shape;
  const vocab = logProbs.shape[1]!;
  const predicted = tf.slice(logProbs.reshape([B, S, vocab]), [0, 0, 0], [B, S - 1, vocab]);
  const next = tf.oneHot(tf.slice(tokens, [0, 1], [B, S - 1]) as tf.Tensor2D, vocab);
  return tf.neg(tf.div(tf.sum(tf.mul(predicted, next)), B * (S - 1)));
}

/** Random numbers of the evaluations. */
export interface EvaluationDraws {
  stoch: Draws;
  random: T<'N ΣC'>;
  /** of StochasticReconSubsetLoss and of the hidden activations */
  subset: Draws;
}
function evaluationDraws(problem: Problem, N: number, key: T): EvaluationDraws {
  const [stoch, subset] = [0, 1].map(i => stochasticDraws(problem, N, tf.add(key, tf.tensor1d([0, i], 'int32'))));
  return { stoch: stoch!, subset: subset!, random: uniform([N, totalC(problem.modules)], key, PURPOSE.randomMask) };
}

/** CE and KL under every masking strategy (delta 0 except in stoch), and the training losses but the adversary's. */
export function evaluateMasks(problem: Problem, params: Tensors, tokens: T<'B S'>, p: T, draws: EvaluationDraws) {
  const { config, modules } = problem;
  const { pass, z, g } = importances(problem, params, tokens);
  const strategies: Record<string, Masks> = {
    ci_masked: { mask: g },
    unmasked: { mask: tf.ones([1, totalC(modules)]) },
    stoch_masked: { mask: interpolate(g, draws.stoch.u), delta: draws.stoch.delta },
    random_masked: { mask: draws.random },
    rounded_masked: { mask: indicator(tf.greater(g, config.roundingThreshold)) },
    zero_masked: { mask: tf.zeros([1, totalC(modules)]) },
  };
  const ceTarget = crossEntropy(pass.logProbs, tokens);
  const scalars: Tensors = {
    'ce_kl/ce_target': ceTarget,
    'loss/FaithfulnessLoss': faithfulnessLoss(problem, params),
    'loss/ImportanceMinimalityLoss': importanceLoss(upperLeaky(z, config.leakyAlpha), p, config, 1),
    'loss/StochasticReconSubsetLoss': stochasticLoss(problem, params, pass, g, draws.subset),
  };
  for (const [name, masks] of Object.entries(strategies)) {
    const logits = maskedLogits(problem, params, tokens, masks);
    scalars[`ce_kl/kl_${name}`] = klLoss(pass, logits);
    scalars[`ce_kl/ce_difference_${name}`] = tf.sub(crossEntropy(tf.logSoftmax(logits), tokens), ceTarget);
  }
  const active = tf.mean(indicator(tf.greater(g, config.ciAliveThreshold)), 0); // [ΣC]
  return { ...scalars, active, meanCi: tf.mean(g, 0) };
}

/** KL when the components are deleted (mask 0, delta 0) whose `mask` [1, ΣC] is 0, and all others stay on. */
export const klAlive = (problem: Problem, params: Tensors, tokens: T<'B S'>, mask: T) =>
  klLoss(targetPass(problem.target, tokens), maskedLogits(problem, params, tokens, { mask }));

/** Fresh PGD: the KL at one source [1, ΣC + M] shared by the whole batch, and where a step of sign ascent takes it. */
export function pgdStep(problem: Problem, params: Tensors, tokens: T<'B S'>, source: T) {
  const { pass, g } = importances(problem, params, tokens);
  const { value, grads } = tf.valueAndGrads(s => adversarialLoss(problem, params, pass, g, s))([source]);
  const moved = tf.add(source, tf.mul(problem.config.pgdEvalStepSize, tf.sign(grads[0]!)));
  return { kl: value, next: tf.clipByValue(moved, 0, 1) };
}

/** Mean of (module output in the masked forward − in the target's)², by module [M]; CI masks and stochastic ones. */
export function hiddenActsErrors(problem: Problem, params: Tensors, tokens: T<'B S'>, draws: Draws) {
  const { pass, g } = importances(problem, params, tokens);
  const errors = (masks: Masks) => {
    const [linear, outputs] = [maskedLinear(problem, params, masks), {} as Tensors];
    targetForward(problem.target, tokens, (name, x) => {
      outputs[name] = linear(name, x);
      return outputs[name];
    });
    return tf.stack(problem.modules.map(m => tf.mean(tf.squaredDifference(outputs[m.path]!, pass.outputs[m.path]!))));
  };
  return { CI: errors({ mask: g }), Stochastic: errors({ mask: interpolate(g, draws.u), delta: draws.delta }) };
}

export interface Evaluation {
  metrics: Metrics;
  /** mean g of every component over the rows [ΣC] */
  meanCi: Float32Array;
}

/** Compiles the evaluations; the result evaluates the parameters as they are then, averaged over batches of rows. */
export function compileEvaluation(engine: Engine, problem: Problem, params: Params) {
  const { modules, config } = problem;
  const sumC = totalC(modules);
  const masks = engine.compile('evaluate', ({ tokens, key, p }: Record<'tokens' | 'key' | 'p', T>) =>
    evaluateMasks(problem, params, tokens, p, evaluationDraws(problem, tokens.size, key)),
  );
  const alive = engine.compile('alive', ({ tokens, mask }: Record<'tokens' | 'mask', T>) => ({
    kl: klAlive(problem, params, tokens, mask),
  }));
  const pgd = engine.compile('pgd', ({ tokens, source }: Record<'tokens' | 'source', T>) =>
    pgdStep(problem, params, tokens, source),
  );
  const hidden = engine.compile('hidden acts', ({ tokens, key }: Record<'tokens' | 'key', T>) =>
    hiddenActsErrors(problem, params, tokens, evaluationDraws(problem, tokens.size, key).subset),
  );

  const evaluate = async (rows: Rows, { step, slow }: { step: number; slow: boolean }): Promise<Evaluation> => {
    const metrics: Metrics = {};
    const [meanCi, active] = [new Float32Array(sumC), new Float32Array(sumC)];
    const p = tf.scalar(schedule(config, Math.min(step, config.nSteps - 1)).p);
    const size = config.evalBatchSize;
    const batches = range(0, Math.ceil(rows.count / size)).map(b => {
      const indices = range(b * size, Math.min((b + 1) * size, rows.count));
      const key = randomKey(config.seed ^ 0x5eed, 2 * b);
      return { tokens: tokenBatch(rows, indices), key, share: indices.length / rows.count };
    });
    for (const { tokens, key, share } of batches) {
      const add = (name: string, value: number) => {
        metrics[`eval/${name}`] = (metrics[`eval/${name}`] ?? 0) + share * value;
      };
      const { active: on, meanCi: ci, ...scalars } = await masks({ tokens, key, p });
      for (const [name, value] of Object.entries(scalars)) add(name, (await numbers(value as T))[0]!);
      for (const [sum, part] of [
        [meanCi, await numbers(ci)],
        [active, await numbers(on)],
      ] as const) {
        for (let c = 0; c < sumC; c++) sum[c]! += share * part[c]!;
      }
      let source = tf.tidy(() => uniform([1, sumC + modules.length], key, PURPOSE.pgd));
      for (let i = 0; i <= config.pgdEvalNSteps; i++) {
        const { kl, next } = await pgd({ tokens, source });
        if (i === config.pgdEvalNSteps) add('loss/PGDReconLoss', (await numbers(kl))[0]!);
        source = next;
      }
      for (const [kind, errors] of slow ? Object.entries(await hidden({ tokens, key })) : []) {
        const values = await numbers(errors);
        const total =
          modules.reduce((sum, m, i) => sum + m.dOut * values[i]!, 0) / modules.reduce((n, m) => n + m.dOut, 0);
        for (const [i, m] of modules.entries()) add(`loss/${kind}HiddenActsReconLoss/${m.path}`, values[i]!);
        add(`loss/${kind}HiddenActsReconLoss/total`, total);
      }
    }
    const mask = tf.tensor2d(
      meanCi.map(ci => Number(ci >= DEAD_BELOW)),
      [1, sumC],
    );
    metrics['eval/ce_kl/kl_alive'] = 0;
    for (const { tokens, share } of batches) {
      metrics['eval/ce_kl/kl_alive'] += share * (await numbers((await alive({ tokens, mask })).kl))[0]!;
    }
    for (const [name, difference] of Object.entries(metrics)) {
      if (!name.includes('ce_difference')) continue;
      metrics[name.replace('difference', 'unrecovered')] =
        difference / metrics['eval/ce_kl/ce_difference_zero_masked']!;
    }
    const threshold = config.ciAliveThreshold; // as Python writes a float
    const l0 = `eval/l0/${Number.isInteger(threshold) ? threshold.toFixed(1) : threshold}`;
    metrics[`${l0}_total`] = 0;
    for (const { path: name, offset, C } of modules) {
      metrics[`${l0}_${name}`] = active.subarray(offset, offset + C).reduce((a, b) => a + b, 0);
      metrics[`${l0}_total`]! += metrics[`${l0}_${name}`]!;
    }
    metrics['eval/n_alive'] = meanCi.reduce((n, ci) => n + Number(ci >= DEAD_BELOW), 0);
    return { metrics, meanCi };
  };
  return (rows: Rows, options: { step: number; slow: boolean }) => tidyAsync(() => evaluate(rows, options));
}

// ---- K. Run folder --------------------------------------------------------------------------------------------------
// A checkpoint is a pair: components.safetensors, and the state.safetensors whose metadata names the step and the
// SHA-256 of the components that it belongs to. Files under these names are only ever replaced by renames, and before
// the first of the two renames the old pair has got second names (*.previous). So whenever a save is cut off, a state
// is there beside its own components: both old, or both new.

const PAIR = ['state', 'components'] as const; // in this order: where components are, a checkpoint is
const pairFile = (dir: string, what: (typeof PAIR)[number], which: '' | '.next' | '.previous' = '') =>
  path.join(dir, `${what}${which}.safetensors`);

export interface Checkpoint {
  step: number;
  metadata: ReadonlyMap<string, string>; // of the state
  components: string; // paths
  state: string;
}

function sha256(file: string): string {
  const hash = crypto.createHash('sha256');
  const piece = Buffer.alloc(2 ** 22);
  const fd = fs.openSync(file, 'r');
  try {
    for (let n = fs.readSync(fd, piece); n > 0; n = fs.readSync(fd, piece)) hash.update(piece.subarray(0, n));
  } finally {
    fs.closeSync(fd);
  }
  return hash.digest('hex');
}

/** The two files as a checkpoint, unless one is missing or broken or the state belongs to other components. */
function fittingPair(components: string, state: string): Checkpoint | undefined {
  try {
    const { metadata, close } = openSafetensors(state);
    close();
    if (metadata.get('components') !== sha256(components)) return undefined;
    return { step: Number(metadata.get('step')), metadata, components, state };
  } catch (error) {
    if (error instanceof UsageError || (error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

/** Saves both files as one checkpoint. If this throws or is killed, the last checkpoint can still be loaded. */
export async function saveCheckpoint(
  dir: string,
  step: number,
  components: Iterable<TensorToWrite>,
  state: Iterable<TensorToWrite>,
  metadata: Readonly<Record<string, string>> = {},
): Promise<void> {
  const rename = (from: string, to: string) => {
    fs.renameSync(from, to);
    syncToDisk(dir);
  };
  const removeUnfinished = () => {
    for (const name of fs.readdirSync(dir))
      if (/^(components|state)\.(next|.*\.tmp-\d+$)/.test(name)) fs.rmSync(path.join(dir, name), { force: true });
  };
  removeUnfinished(); // of a process that was killed
  try {
    const hash = await writeSafetensors(pairFile(dir, 'components', '.next'), components, {
      format: 'pt',
      step: `${step}`,
    });
    await writeSafetensors(pairFile(dir, 'state', '.next'), state, { ...metadata, step: `${step}`, components: hash });
  } catch (error) {
    removeUnfinished();
    throw error;
  }
  // Two files that don't fit were left by a save cut off between the renames below: the previous pair is then the good one.
  if (fittingPair(pairFile(dir, 'components'), pairFile(dir, 'state')))
    for (const what of PAIR) {
      const secondName = `${pairFile(dir, what, '.previous')}.tmp-${process.pid}`;
      try {
        fs.linkSync(pairFile(dir, what), secondName);
      } catch {
        fs.copyFileSync(pairFile(dir, what), secondName); // a file system without hard links
        syncToDisk(secondName);
      }
      rename(secondName, pairFile(dir, what, '.previous'));
    }
  for (const what of PAIR) rename(pairFile(dir, what, '.next'), pairFile(dir, what));
}

/** The last checkpoint that is whole; undefined before the first. A warning says so when it is not the one last written. */
export function loadCheckpoint(dir: string): (Checkpoint & { warning?: string }) | undefined {
  const some = (['', '.previous'] as const).some(which => fs.existsSync(pairFile(dir, 'components', which)));
  if (!some) return;
  for (const stateOf of ['', '.previous'] as const)
    for (const componentsOf of ['', '.previous'] as const) {
      const pair = fittingPair(pairFile(dir, 'components', componentsOf), pairFile(dir, 'state', stateOf));
      if (pair && !stateOf && !componentsOf) return pair;
      if (pair) return { ...pair, warning: `${dir}: the last save was cut off; going on from step ${pair.step}` };
    }
  throw new UsageError(
    `${dir}: state.safetensors and components.safetensors are broken or not of the same save, the previous ones too`,
  );
}

// What a resumed run may change: nothing that the training's numbers depend on (model and data are compared by content) …
const MAY_CHANGE = [
  ...['model', 'data', 'evalData', 'labels', 'out', 'logEvery', 'saveEvery', 'harvest', 'harvestRows'],
  ...Object.keys(GROUPS.Evaluation),
];
// … and what changes only how they are rounded, or which random numbers are drawn.
const CHANGES_BITS = Object.keys(GROUPS.Engine);

/** Refuses, by name, fields that a resumed run must not change; returns a warning for each that costs exactness. */
export function compareConfigs(
  old: Readonly<Record<string, unknown>>,
  now: Readonly<Record<string, unknown>>,
): string[] {
  const changes = [...new Set([...Object.keys(old), ...Object.keys(now)])]
    .map(field => ({ field, was: JSON.stringify(old[field]), is: JSON.stringify(now[field]) }))
    .filter(({ field, was, is }) => was !== is && !MAY_CHANGE.includes(field));
  const refused = changes.filter(({ field }) => !CHANGES_BITS.includes(field));
  if (refused.length)
    throw new UsageError(
      `--resume: ${refused.map(({ field, was, is }) => `${field} was ${was} and is now ${is}`).join(', ')}; ` +
        'start a new run for that',
    );
  return changes.map(({ field, was, is }) => `${field} was ${was} and is now ${is}: not bit for bit the same run`);
}

// ---- Interruption and divergence ----

/**
 * SIGINT and SIGTERM ask the loop to stop after its step. From then on the system handles them, so that a second one
 * ends the process at once, even inside a long native call.
 */
export function watchSignals(say: (line: string) => void) {
  let exitCode: number | undefined;
  const onSignal = (signal: 'SIGINT' | 'SIGTERM') => {
    if (exitCode) process.exit(exitCode); // two of them came during one native call
    exitCode = 128 + os.constants.signals[signal];
    say(`${signal}: saving after this step; once more stops at once`);
  };
  process.on('SIGINT', onSignal).on('SIGTERM', onSignal);
  const stop = () => process.off('SIGINT', onSignal).off('SIGTERM', onSignal);
  return {
    /** To be awaited after each step: lets signals in, and gives the exit code (130 or 143) once one has come. */
    async interrupted(): Promise<number | undefined> {
      await new Promise(setImmediate);
      if (exitCode) stop();
      return exitCode;
    },
    stop,
  };
}

/** Losses or gradients are no longer numbers: exit code 1. */
export class DivergenceError extends Error {}

/** Throws when one of a step's losses or gradient norms is not finite; parameters are only read then. */
export async function checkFinite(
  step: number,
  scalars: Readonly<Record<string, number>>,
  parameters: Iterable<TensorToWrite>,
): Promise<void> {
  const broken = Object.entries(scalars).filter(([, value]) => !Number.isFinite(value));
  if (!broken.length) return;
  let [largest, size] = ['none', -1];
  for (const { name, data } of parameters)
    for (const value of typeof data === 'function' ? await data() : data)
      if (!(Math.abs(value) <= size) && size < Number.POSITIVE_INFINITY) {
        // NaN counts as the largest
        [largest, size] = [name, Number.isNaN(value) ? Number.POSITIVE_INFINITY : Math.abs(value)];
      }
  throw new DivergenceError(
    `diverged at step ${step}: ${broken.map(([name, value]) => `${name} is ${value}`).join(', ')}; the largest ` +
      `parameter is in ${largest} (${Number.isFinite(size) ? size.toPrecision(3) : 'not finite'}); the last checkpoint is untouched`,
  );
}

/** What config.json holds. */
export interface RunRecord {
  formatVersion: 1;
  config: Config;
  model: { path: string; type: string; sha256: string };
  data: { path: string; sha256: string; trainRows: number; heldOutRows: number };
  modules: Record<string, { dIn: number; dOut: number; C: number }>;
  engine: { name: string; description: string };
  versions: Record<string, string>;
  command: string[];
}
const VERSION = '0.1.0';

function runRecord({ target, modules, config }: Problem, { train, heldOut }: Data, engine: Engine): RunRecord {
  const rows = crypto.createHash('sha256'); // of the training rows
  for (const i of range(0, train.count)) rows.update(train.row(i));
  const model = { path: config.model, type: target.arch.type, sha256: target.sha256 };
  const data = { path: config.data, sha256: rows.digest('hex'), trainRows: train.count, heldOutRows: heldOut.count };
  return {
    ...{ formatVersion: 1, config, model, data },
    modules: Object.fromEntries(modules.map(({ path: name, dIn, dOut, C }) => [name, { dIn, dOut, C }])),
    engine: { name: engine.name, description: engine.description },
    versions: { 'nano-param-decomp': VERSION, node: process.versions.node, tfjs: tf.version.tfjs },
    command: process.argv.slice(2),
  };
}

/** Writes beside and renames, so that nobody ever reads half a file. */
function writeAtomic(file: string, content: string): void {
  fs.writeFileSync(`${file}.tmp-${process.pid}`, content);
  fs.renameSync(`${file}.tmp-${process.pid}`, file);
}

/** Variables as tensors to write, under `prefix` + name. */
const toWrite = (variables: Params, prefix = ''): TensorToWrite[] =>
  Object.entries(variables).map(([name, variable]) => ({
    ...{ name: prefix + name, shape: variable.shape, dtype: 'F32' as const },
    data: () => numbers(variable),
  }));

/** What --resume needs besides the parameters. */
const stateToWrite = ({ m, v, sources }: State): TensorToWrite[] =>
  [toWrite(m, 'adam.m.'), toWrite(v, 'adam.v.'), toWrite(sources, 'ppgd.')].flat();

/** Sets variables from a file of toWrite. */
function restore(file: string, variables: Params, prefix = ''): void {
  const stored = openSafetensors(file);
  for (const [name, variable] of Object.entries(variables)) {
    const shape = stored.tensors.get(prefix + name)?.shape;
    if (shape?.join() !== variable.shape.join())
      refuse(`${file}: ${prefix + name} is [${shape}], not [${variable.shape}]`);
    tf.tidy(() => variable.assign(tf.tensor(stored.readFloat32(prefix + name), variable.shape)));
  }
  stored.close();
}

// ---- L. Harvest ----------------------------------------------------------------------------------------------------
// One streaming pass that finds out what every component does: how often it fires, on which tokens, ahead of which
// predictions, together with whom, and where in the text. A component *fires* at a position when its causal
// importance g is above the threshold. The engine runs the network and one matmul (which tokens does the target
// predict where c fires?); the rest is counted in JavaScript, a row and a component at a time.
//
// Memory is bounded by the settings, never by the data, and nothing but the order of equals depends on the batches.
// Densities, means and top examples are exact. Exact until a bound is reached: output statistics cover only the
// likeliest tokens when components x vocabulary > outputCells; a component has cells for `inputTokens` input tokens
// (when the vocabulary is larger, they are a summary that reports its error); pairs are counted at a random share of
// the positions when more than `pairsPerPosition` fire together, and only among the first `pairedComponents` that fire.

/** The target's and the CI function's forward on rows of tokens: N = B·S positions, ΣC components. */
export type HarvestPass = (tokens: T<'B S'>) => {
  ci: T<'N ΣC'>; // g
  activation: T<'N ΣC'>; // (x V_c)·‖U_c‖
  probs: T<'N vocab'>; // the target's softmax
};

export const harvestDefaults = {
  threshold: 0, // a component fires where its CI is above this
  examples: 10, // of each kind (top, random) per component
  window: 41, // tokens of an example, the firing one in the middle
  listLength: 10, // tokens in each top and bottom list
  partners: 8, // of each kind (Jaccard, PMI) per component
  minCount: 3, // a token enters a list when it was counted, or was expected, this often
  minTogether: 10, // a partner enters the PMI list when both fired together this often
  lowCount: 100, // components with fewer firings are marked: their statistics are noisy
  passageFirings: 256, // components listed per position of a passage
  batchPositions: 4096, // positions of a batch,
  batchCells: 2 ** 22, // and cells of its [N, ΣC] matrices, which are read back: 16 MB each
  outputCells: 2 ** 25, // cells of the component x output token table (128 MiB)
  inputTokens: 4096, // distinct input tokens counted per component
  pairsPerPosition: 512, // pairs counted per position, on average
  pairedComponents: 12_000, // components whose pairs are counted (at most 288 MB)
  seed: 0,
};
export type HarvestSettings = typeof harvestDefaults;

export interface HarvestOptions {
  pass: HarvestPass;
  engine: Pick<Engine, 'compile'>;
  modules: readonly Module[];
  vocabSize: number;
  tokenText: (id: number) => string;
  rows: Rows;
  passages: Int32Array[]; // held-out rows for the page's passage view
  settings?: Partial<HarvestSettings>;
  progress?: (positions: number) => void;
}

/** How often a token was counted, and PMI = ln(n_ct·N/(n_c·n_t)) in nats; null: never counted, PMI is −∞. */
export type TokenStat = [token: number, count: number, pmi: number | null];
/** A partner's n_ab, Jaccard index n_ab/(n_a + n_b − n_ab) and PMI = ln(n_ab·N/(n_a·n_b)) in nats. */
export type Partner = [column: number, together: number, jaccard: number, pmi: number];

/** A window around one firing, clipped to its row: three lists of one length. */
export interface Example {
  row: number; // of the data, from 0
  start: number; // position in the row of the window's first token
  at: number; // index in the lists of the token where the component fired
  tokens: number[];
  ci: number[];
  activation: number[];
}

export interface HarvestComponent {
  module: string;
  index: number; // in its module
  column: number; // offset of the module + index, the number that partners and passages use
  firings: number; // positions where it fires, n_c
  density: number; // firings / positions
  meanCi: number; // over all positions
  meanActivation: number; // of ‖U_c‖·(x V_c) over its firings; (−V, −U) is the same component, so the sign is free
  lowCount: boolean;
  examples: { top: Example[]; random: Example[] }; // one a row; top: by CI, then |activation|; random: uniform
  input: { top: TokenStat[]; bottom: TokenStat[]; missed: number }; // counts are short by at most `missed`
  output: { top: TokenStat[]; bottom: TokenStat[] }; // counts: the target's softmax, summed over the firings
  partners: { jaccard: Partner[]; pmi: Partner[] };
}

/** A held-out row, position by position. */
export interface Passage {
  tokens: number[];
  positions: {
    fired: number; // how many components fire
    firing: [column: number, ci: number, activation: number][]; // these, by CI, at most `passageFirings`
    predictions: [token: number, probability: number][]; // the target's five likeliest next tokens
  }[];
}

/** The content of harvest.json. */
export interface Harvest {
  formatVersion: 1;
  positions: number; // N
  pairPositions: number; // positions at which pairs were counted: N in partners
  outputTokens: number; // tokens that the output statistics cover
  settings: HarvestSettings;
  modules: { path: string; offset: number; C: number; alive: number; meanCi: number[] }[]; // meanCi by index
  components: HarvestComponent[]; // those that fired, by column; the others are C − alive
  passages: Passage[];
  vocabulary: Record<number, string>; // the text of every token above
}

export async function harvest(options: HarvestOptions): Promise<Harvest> {
  const settings = { ...harvestDefaults, ...options.settings };
  const { pass, modules, rows, vocabSize } = options;
  if (rows.count === 0) throw new Error('harvest: no data');
  const [S, columns] = [rows.seqLen, totalC(modules)]; // ΣC
  const positions = Math.min(settings.batchPositions, settings.batchCells / columns);
  const B = Math.max(1, Math.min(rows.count, Math.floor(positions / S)));
  const covered = Math.min(vocabSize, Math.floor(settings.outputCells / columns)); // T
  const { outputTokens, pairShare } = await survey(pass, rows, covered, settings);
  const mass = zeros([columns, covered]); // softmax mass of a token where c fires
  const totalMass = zeros([1, covered]);
  const reduce = options.engine.compile('harvest', ({ tokens, weight, outputTokens }: Tensors) => {
    const { ci, activation, probs } = pass(tokens!);
    const p = covered < vocabSize ? tf.gather(probs, outputTokens!, 1) : probs; // [N, T]
    const fire = indicator(tf.greater(ci, settings.threshold)); // [N, ΣC]
    mass.assign(tf.add(mass, tf.matMul(fire, tf.mul(p, weight!), true)));
    totalMass.assign(tf.add(totalMass, tf.matMul(weight!, p, true)));
    return { ci: tf.transpose(ci), activation: tf.transpose(activation) }; // [ΣC, N]
  });

  const seed = scramble(scramble(settings.seed) ^ PURPOSE.harvest);
  const counts: Counts = {
    ...{ positions: 0, pairPositions: 0, inputTotal: new Float64Array(vocabSize), tallies: [] },
    ...{ ciSum: new Float64Array(columns), slotOf: new Int32Array(columns).fill(-1) },
  };
  for (let first = 0; first < rows.count; first += B) {
    const end = Math.min(first + B, rows.count);
    const N = (end - first) * S;
    const tokens = new Int32Array(B * S); // a short last batch is padded: a traced graph has one shape
    for (let row = first; row < end; row++) tokens.set(rows.row(row), (row - first) * S);
    const feeds = {
      tokens: tf.tensor2d(tokens, [B, S], 'int32'),
      weight: tf.tensor2d(new Float32Array(B * S).fill(1, 0, N), [B * S, 1]), // 0 on the padding
      outputTokens: tf.tensor1d(outputTokens, 'int32'),
    };
    const out = await reduce(feeds);
    const [ci, activation] = (await Promise.all([out.ci, out.activation].map(numbers))) as [Float32Array, Float32Array];
    tf.dispose([feeds, out]);
    const draws = Int32Array.from({ length: N }, (_, n) => scramble(seed ^ (first * S + n)));
    const batch = { first, S, N, tokens, ci, activation, draws, fired: new Int32Array(N + 1) };
    countBatch(counts, batch, pairShare, settings);
    options.progress?.(end * S);
  }

  const output = { tokens: outputTokens, mass: await numbers(mass), total: await numbers(totalMass) };
  tf.dispose([mass, totalMass]);
  const components = describe(counts, modules, output, settings);
  const passages: Passage[] = [];
  for (const row of options.passages) passages.push(await readPassage(pass, row, settings));
  return {
    ...{ formatVersion: 1, positions: counts.positions, pairPositions: counts.pairPositions, outputTokens: covered },
    settings,
    modules: modules.map(({ path, offset, C }) => ({
      ...{ path, offset, C, alive: components.filter(c => c.module === path).length },
      meanCi: Array.from(counts.ciSum.subarray(offset, offset + C), sum => round(sum / counts.positions)),
    })),
    components,
    passages,
    vocabulary: vocabularyOf(components, passages, options.tokenText),
  };
}

/** What the first rows say: the T tokens with the largest softmax mass, and at which share of positions to count pairs. */
async function survey(pass: HarvestPass, rows: Rows, T: number, { threshold, pairsPerPosition }: HarvestSettings) {
  const some = tokenBatch(rows, range(0, Math.min(rows.count, Math.ceil(512 / rows.seqLen))));
  const out = tf.tidy(() => {
    const { ci, probs } = pass(some);
    return [tf.sum(probs, 0), tf.sum(indicator(tf.greater(ci, threshold)), 1)];
  });
  const [mass, firing] = (await Promise.all(out.map(numbers))) as [Float32Array, Float32Array]; // [vocab], [N]
  tf.dispose([some, out]);
  const byMass = Int32Array.from(mass.keys());
  if (T < mass.length) byMass.sort((a, b) => mass[b]! - mass[a]!);
  const pairs = firing.reduce((sum, n) => sum + n ** 2 / 2, 0) / firing.length; // per position
  return { outputTokens: byMass.subarray(0, T), pairShare: pairsPerPosition / pairs };
}

/** What is kept while the data streams by. */
interface Counts {
  positions: number;
  pairPositions: number;
  inputTotal: Float64Array; // [vocab] n_t
  ciSum: Float64Array; // [ΣC] over all positions
  slotOf: Int32Array; // [ΣC] order of appearance; -1: has not fired
  tallies: Tally[]; // by slot
}
interface Tally {
  column: number;
  slot: number;
  firings: number; // n_c
  activationSum: number; // over the firings
  inputs: Uint32Array; // [vocab] firings on each token
  summary: Map<number, number> | undefined; // instead, when the vocabulary is large: on the most frequent ones
  missed: number; // by how much a count in it may be short
  together: Uint32Array; // [slot + 1] positions shared with each lower slot; last: its own; empty: not counted
  top: Scored<Example>[];
  random: Scored<Example>[];
}
/** What the engine gave for the rows from `first` on. */
interface Batch {
  first: number;
  S: number;
  N: number; // positions, without the padding
  tokens: Int32Array; // [N or more]
  ci: Float32Array; // [ΣC, N or more]
  activation: Float32Array;
  draws: Int32Array; // [N] random from -2³¹ to 2³¹, by seed and position in the data alone: batches don't matter
  fired: Int32Array; // [N + 1] room for the positions where one component fires
}
/** Lists of these have the largest score first. */
interface Scored<X> {
  score: number;
  item: X;
}

function countBatch(counts: Counts, batch: Batch, pairShare: number, settings: HarvestSettings): void {
  const { N, tokens, draws, fired } = batch;
  const paired = draws.map(draw => Number(draw / 2 ** 32 + 0.5 < pairShare));
  const firing = range(0, N).map((): number[] => []); // slots that fire at a paired position: few on average
  for (let c = 0; c < counts.ciSum.length; c++) {
    const count = listFirings(counts.ciSum, batch, c, settings.threshold);
    if (count === 0) continue;
    const tally = tallyOf(counts, c, settings);
    countFirings(tally, batch, count, settings);
    for (let k = 0; k < count; k++) if (paired[fired[k]!]) firing[fired[k]!]!.push(tally.slot);
  }
  for (let n = 0; n < N; n++) {
    counts.inputTotal[tokens[n]!]!++;
    if (paired[n]) countPairs(counts, Int32Array.from(firing[n]!).sort());
  }
  counts.positions += N;
}

// The next two are what a harvest costs beyond the forward passes: no objects in the loops, sums in local variables.

/** Lists the positions where c fires, without a branch: a processor that has to guess would often guess wrong. */
function listFirings(ciSum: Float64Array, { N, tokens, ci, fired }: Batch, c: number, threshold: number): number {
  const first = c * tokens.length;
  const limit = Math.fround(threshold); // what the engine compares with
  let count = 0;
  let sum = 0;
  for (let n = 0; n < N; n++) {
    const g = ci[first + n]!;
    sum += g;
    fired[count] = n; // overwritten by the next if c does not fire here
    count += Number(g > limit);
  }
  ciSum[c]! += sum;
  return count;
}

/** Counts a component's firings in a batch, which are at fired[0 .. count]; the best of each row may be an example. */
function countFirings(tally: Tally, batch: Batch, count: number, settings: HarvestSettings): void {
  const { column, inputs, summary, top, random } = tally;
  const { S, tokens, ci, activation, draws, fired } = batch;
  const { examples, window, inputTokens } = settings;
  const first = column * tokens.length;
  const shift = scramble(column); // so that components that fire together have different random examples
  let sum = 0;
  let k = 0;
  for (let rowEnd = S; k < count; rowEnd += S) {
    let topScore = floor(top, examples);
    let randomScore = floor(random, examples);
    let topAt = -1;
    let randomAt = -1;
    for (; k < count && fired[k]! < rowEnd; k++) {
      const n = fired[k]!;
      const a = activation[first + n]!;
      sum += a;
      if (summary) countInput(tally, summary, tokens[n]!, inputTokens);
      else inputs[tokens[n]!]!++;
      const strength = ci[first + n]! + 1e-9 * Math.abs(a); // CI, then |activation|: a CI of exactly 1 is common
      if (strength > topScore) {
        topScore = strength;
        topAt = n;
      }
      const draw = Math.imul(draws[n]! ^ shift, 0x85ebca6b); // random for each firing: the largest are a random choice
      if (draw > randomScore) {
        randomScore = draw;
        randomAt = n;
      }
    }
    if (topAt >= 0) insert(top, examples, topScore, windowAround(batch, column, topAt, window));
    if (randomAt >= 0) insert(random, examples, randomScore, windowAround(batch, column, randomAt, window));
  }
  tally.firings += count;
  tally.activationSum += sum;
}

function tallyOf({ slotOf, tallies, inputTotal }: Counts, column: number, settings: HarvestSettings): Tally {
  if (slotOf[column]! >= 0) return tallies[slotOf[column]!]!;
  const slot = tallies.length;
  const vocabSize = inputTotal.length;
  const tally: Tally = {
    ...{ column, slot, firings: 0, activationSum: 0, missed: 0, top: [], random: [] },
    inputs: new Uint32Array(vocabSize <= settings.inputTokens ? vocabSize : 0),
    summary: vocabSize <= settings.inputTokens ? undefined : new Map(),
    together: new Uint32Array(slot < settings.pairedComponents ? slot + 1 : 0),
  };
  slotOf[column] = slot;
  tallies.push(tally);
  return tally;
}

/** Misra-Gries: over the limit, every count loses 1 and the zeros go. What is frequent stays. */
function countInput(tally: Tally, summary: Map<number, number>, token: number, limit: number): void {
  summary.set(token, (summary.get(token) ?? 0) + 1);
  if (summary.size <= limit) return;
  tally.missed++;
  for (const [t, n] of summary) n === 1 ? summary.delete(t) : summary.set(t, n - 1);
}

function windowAround({ first, S, tokens, ci, activation }: Batch, column: number, n: number, window: number): Example {
  const row = Math.floor(n / S);
  const before = Math.floor(window / 2);
  const start = Math.max(row * S, n - before);
  const end = Math.min((row + 1) * S, n - before + window);
  const example: Example = {
    row: first + row,
    start: start - row * S,
    at: n - start,
    tokens: [],
    ci: [],
    activation: [],
  };
  for (let k = start; k < end; k++) {
    example.tokens.push(tokens[k]!);
    example.ci.push(ci[column * tokens.length + k]!);
    example.activation.push(activation[column * tokens.length + k]!);
  }
  return example;
}

/** Pair counts are a triangle whose rows are made as components appear: memory goes with the alive ones squared. */
function countPairs(counts: Counts, slots: Int32Array): void {
  for (let k = 0; k < slots.length; k++) {
    const { together } = counts.tallies[slots[k]!]!;
    if (together.length === 0) break; // later slots have no row either
    for (let j = 0; j <= k; j++) together[slots[j]!]!++;
  }
  counts.pairPositions++;
}

/** The score that a list of at most `size` takes no longer. */
const floor = (list: Scored<unknown>[], size: number) => (list.length < size ? -Infinity : list[size - 1]!.score);

/** Puts an item into a list of at most `size`; equal ones keep their order. */
function insert<X>(list: Scored<X>[], size: number, score: number, item: X): void {
  if (score <= floor(list, size)) return;
  let i = list.length;
  while (i > 0 && score > list[i - 1]!.score) i--;
  list.splice(i, 0, { score, item });
  if (list.length > size) list.pop();
}

/** The counts as densities, means, lists and partners, by column. */
function describe(
  counts: Counts,
  modules: readonly Module[],
  output: { tokens: Int32Array; mass: Float32Array; total: Float32Array }, // [T], [ΣC, T], [T]
  settings: HarvestSettings,
): HarvestComponent[] {
  const { positions, inputTotal } = counts;
  const T = output.tokens.length;
  const byFrequency = (total: Float64Array | Float32Array) =>
    range(0, total.length)
      .filter(t => total[t]! >= settings.minCount)
      .sort((a, b) => total[b]! - total[a]!);
  const [inputOrder, outputOrder] = [byFrequency(inputTotal), byFrequency(output.total)];
  const partners = partnersOf(counts, settings);
  const shown = (list: Scored<Example>[]) =>
    list.map(({ item }): Example => {
      const [ci, activation] = [item.ci, item.activation].map(values => values.map(x => round(x, 3)));
      return { ...item, ci: ci!, activation: activation! };
    });
  const all = counts.tallies.map((tally, slot): HarvestComponent => {
    const { column, inputs, summary, missed, firings } = tally;
    const { path, offset } = modules.findLast(m => m.offset <= column)!;
    const onInput = (t: number) => (summary ? (summary.get(t) ?? 0) : inputs[t]!);
    const input = tokenLists(inputOrder, inputTotal, firings / positions, onInput, settings);
    const onOutput = (t: number) => output.mass[column * T + t]!;
    const { top, bottom } = tokenLists(outputOrder, output.total, firings / positions, onOutput, settings);
    const named = (list: TokenStat[]) => list.map(([t, ...rest]): TokenStat => [output.tokens[t]!, ...rest]);
    return {
      ...{ module: path, index: column - offset, column, firings, density: round(firings / positions) },
      meanCi: round(counts.ciSum[column]! / positions),
      meanActivation: round(tally.activationSum / firings),
      lowCount: firings < settings.lowCount,
      examples: { top: shown(tally.top), random: shown(tally.random) },
      // After a summary has dropped tokens, "never counted" no longer means "never there".
      input: { ...input, bottom: input.bottom.filter(([, n]) => missed === 0 || n > 0), missed },
      output: { top: named(top), bottom: named(bottom) },
      partners: partners[slot]!,
    };
  });
  return all.sort((a, b) => a.column - b.column);
}

/** Tokens counted more (top) and less (bottom) often than chance would have it: PMI = ln(count / expected). */
function tokenLists(
  order: number[], // by falling frequency, which decides between equals
  total: Float64Array | Float32Array, // n_t
  density: number, // n_c / N
  countOf: (token: number) => number,
  { minCount, listLength }: HarvestSettings,
): { top: TokenStat[]; bottom: TokenStat[] } {
  const top: Scored<TokenStat>[] = [];
  const bottom: Scored<TokenStat>[] = [];
  for (const token of order) {
    const [count, expected] = [countOf(token), density * total[token]!];
    if (Math.max(count, expected) < minCount) continue;
    const pmi = Math.log(count / expected);
    const stat: TokenStat = [token, round(count), count > 0 ? round(pmi) : null];
    if (count > expected) insert(top, listLength, pmi, stat);
    if (count < expected) insert(bottom, listLength, -pmi, stat);
  }
  return { top: top.map(({ item }) => item), bottom: bottom.map(({ item }) => item) };
}

/** By slot. */
function partnersOf({ tallies, pairPositions }: Counts, settings: HarvestSettings): HarvestComponent['partners'][] {
  const lists = tallies.map(() => ({ jaccard: [] as Scored<Partner>[], pmi: [] as Scored<Partner>[] }));
  const offer = (to: number, partner: number, n: number, jaccard: number, pmi: number) => {
    const byPmi = n >= settings.minTogether && pmi > floor(lists[to]!.pmi, settings.partners);
    if (!byPmi && jaccard <= floor(lists[to]!.jaccard, settings.partners)) return; // most pairs
    const item: Partner = [tallies[partner]!.column, n, round(jaccard), round(pmi)];
    insert(lists[to]!.jaccard, settings.partners, jaccard, item);
    if (byPmi) insert(lists[to]!.pmi, settings.partners, pmi, item);
  };
  for (let a = 0; a < tallies.length; a++) {
    const { together } = tallies[a]!;
    for (let b = 0; b + 1 < together.length; b++) {
      const n = together[b]!;
      if (n === 0) continue;
      const [nA, nB] = [together[a]!, tallies[b]!.together[b]!];
      const [jaccard, pmi] = [n / (nA + nB - n), Math.log((n * pairPositions) / (nA * nB))];
      offer(a, b, n, jaccard, pmi);
      offer(b, a, n, jaccard, pmi);
    }
  }
  const items = (list: Scored<Partner>[]) => list.map(({ item }) => item);
  return lists.map(({ jaccard, pmi }) => ({ jaccard: items(jaccard), pmi: items(pmi) }));
}

async function readPassage(pass: HarvestPass, row: Int32Array, settings: HarvestSettings): Promise<Passage> {
  const out = tf.tidy(() => {
    const { ci, activation, probs } = pass(tf.tensor2d(row, [1, row.length], 'int32'));
    const { values, indices } = tf.topk(probs, Math.min(5, probs.shape[1]!));
    return [ci, activation, values, indices];
  });
  const read = await Promise.all(out.map(numbers));
  tf.dispose(out);
  // One position: its line of each [S, ·] matrix.
  const positions = range(0, row.length).map((n): Passage['positions'][number] => {
    const [ci, activation, p, ids] = read.map(x =>
      x.subarray((n * x.length) / row.length, ((n + 1) * x.length) / row.length),
    );
    const fired = [...ci!.keys()].filter(c => ci![c]! > settings.threshold).sort((a, b) => ci![b]! - ci![a]!);
    const strongest = fired.slice(0, settings.passageFirings);
    return {
      fired: fired.length,
      firing: strongest.map(c => [c, round(ci![c]!, 3), round(activation![c]!, 3)]),
      predictions: Array.from(p!, (q, k) => [ids![k]!, round(q, 3)]),
    };
  });
  return { tokens: [...row], positions };
}

function vocabularyOf(components: HarvestComponent[], passages: Passage[], tokenText: (id: number) => string) {
  const used: boolean[] = []; // by id; faster than a Set
  const use = (tokens: number[]) => {
    for (const t of tokens) used[t] = true;
  };
  for (const { examples, input, output } of components) {
    for (const { tokens } of [...examples.top, ...examples.random]) use(tokens);
    for (const list of [input.top, input.bottom, output.top, output.bottom]) use(list.map(([t]) => t));
  }
  for (const { tokens, positions } of passages)
    use([...tokens, ...positions.flatMap(p => p.predictions.map(([t]) => t))]);
  return Object.fromEntries([...used.keys()].filter(t => used[t]).map(t => [t, tokenText(t)]));
}

/** To so many significant digits (toPrecision takes ten times as long). */
function round(x: number, digits = 4): number {
  if (Number.isInteger(x)) return x;
  const scale = 10 ** (digits - 1 - Math.floor(Math.log10(Math.abs(x))));
  return Math.round(x * scale) / scale;
}

/** A rule that the data is known to follow, with the component that answers to it best. */
export interface RuleScore {
  name: string;
  description?: string;
  /** positions at which the rule is in force */
  support: number;
  component: { module: string; index: number };
  precision: number;
  recall: number;
  f1: number;
  /** mean KL without that component where the rule is in force, and elsewhere */
  klInForce: number;
  klElsewhere: number;
  causal: boolean;
}
export interface Scoreboard {
  rules: RuleScore[];
  meanF1: number;
  nF1AtLeast80: number;
  nCausal: number;
}
/** The file of --labels: by row and position, the rules in force when the next token is predicted. */
export interface Labels {
  rules: { name: string; description?: string }[];
  labels: number[][][];
}
/** A component answers to a rule where its importance is above this. */
const ANSWERS_ABOVE = 0.1;

/**
 * The mechanism scoreboard: for each rule the component whose "g > 0.1" has the best F1 for "the rule is in force"
 * (of those within 0.01 of it, the one whose deletion costs most there). It is called causal if deleting that one
 * component from the full model (all others and all deltas on) costs more than 0.1 nats where the rule is in force, and
 * less than a tenth of that elsewhere.
 */
export async function scoreRules(
  engine: Engine,
  problem: Problem,
  params: Params,
  rows: Rows,
  { rules, labels }: Labels,
) {
  const { target, modules } = problem;
  const sumC = totalC(modules);
  const answers = engine.compile('answers', ({ tokens }: Record<'tokens', T>) => ({
    active: indicator(tf.greater(importances(problem, params, tokens).g, ANSWERS_ABOVE)),
  }));
  const without = engine.compile('without', ({ tokens, mask }: Record<'tokens' | 'mask', T>) => {
    const { probs, logProbs } = targetPass(target, tokens);
    const logits = maskedLogits(problem, params, tokens, { mask, delta: tf.ones([1, modules.length]) });
    return { kl: tf.sum(tf.mul(probs, tf.sub(logProbs, tf.logSoftmax(logits))), 1) };
  });
  const tokens = tokenBatch(rows, range(0, labels.length));
  const active = await numbers((await answers({ tokens })).active); // [N, ΣC]
  const inForce = labels.flat();
  const [firings, support] = [new Float64Array(sumC), new Float64Array(rules.length)];
  const both = rules.map(() => new Float64Array(sumC));
  for (const [n, ruleIds] of inForce.entries()) {
    for (const r of ruleIds) support[r]!++;
    for (let c = 0; c < sumC; c++) {
      if (!active[n * sumC + c]) continue;
      firings[c]!++;
      for (const r of ruleIds) both[r]![c]!++;
    }
  }
  const scores: RuleScore[] = [];
  for (const [r, rule] of rules.entries()) {
    const f1 = (c: number) => (2 * both[r]![c]!) / Math.max(1, firings[c]! + support[r]!);
    const ranked = range(0, sumC).sort((a, b) => f1(b) - f1(a));
    // a mechanism often has a component in several layers: among equally good ones, the one that matters most
    const equals = ranked.slice(0, 4).filter(c => f1(c) > f1(ranked[0]!) - 0.01);
    const deletions = await Promise.all(
      equals.map(async c => {
        const mask = tf.tensor2d(
          Float32Array.from({ length: sumC }, (_, i) => Number(i !== c)),
          [1, sumC],
        );
        const kl = await numbers((await without({ tokens, mask })).kl);
        const mean = (wanted: boolean) => {
          const chosen = kl.filter((_, n) => inForce[n]!.includes(r) === wanted);
          return chosen.reduce((a, b) => a + b, 0) / Math.max(1, chosen.length);
        };
        return { c, klInForce: mean(true), klElsewhere: mean(false) };
      }),
    );
    const { c, klInForce, klElsewhere } = deletions.sort((a, b) => b.klInForce - a.klInForce)[0]!;
    const m = modules.find(({ offset, C }) => c < offset + C)!;
    scores.push({
      ...{ ...rule, support: support[r]!, component: { module: m.path, index: c - m.offset }, f1: f1(c) },
      precision: both[r]![c]! / Math.max(1, firings[c]!),
      recall: both[r]![c]! / Math.max(1, support[r]!),
      ...{ klInForce, klElsewhere, causal: klInForce > 0.1 && klElsewhere < klInForce / 10 },
    });
  }
  const meanF1 = scores.reduce((a, s) => a + s.f1, 0) / scores.length;
  const count = (wanted: (s: RuleScore) => boolean) => scores.filter(wanted).length;
  return { rules: scores, meanF1, nF1AtLeast80: count(s => s.f1 >= 0.8), nCausal: count(s => s.causal) };
}

// ---- M. Report -----------------------------------------------------------------------------------------------------
// One HTML file that opens from disk: assets/report.html with the run's data inlined. Token texts are data of
// strangers: they travel as JSON with everything but plain ASCII escaped, and the page only ever sets textContent.

export interface ReportData {
  config: unknown; // of config.json
  metrics: Record<string, number>; // the final evaluation
  history: Record<string, number>[]; // the lines of metrics.jsonl
  scoreboard?: Scoreboard;
  harvest: Harvest;
}

const PLACEHOLDER = '"@@report-data@@"';
const MAX_REPORT_BYTES = 19e6; // examples are left out of a larger page; harvest.json has them all

/** The page of a run. Throws when the template has not exactly one placeholder. */
export function renderReport(template: string, run: ReportData): string {
  const [before, after, ...more] = template.split(PLACEHOLDER);
  if (before === undefined || after === undefined || more.length > 0) {
    throw new Error(`the report's template needs ${PLACEHOLDER} exactly once`);
  }
  const { components, vocabulary, ...rest } = run.harvest;
  const ids = Object.keys(vocabulary).map(Number);
  const numberOf = new Map(ids.map((id, k) => [id, k])); // tokens are numbered by their place in `texts`
  const tokenBytes = ids.length > 2 ** 16 ? 3 : 2;
  const inline = (perKind: number) => {
    const packed = components.map(({ module, index, ...component }) => {
      const { top, random } = component.examples;
      const scale = Math.max(...[...top, ...random].flatMap(e => e.activation.map(Math.abs)), 1e-30);
      const pack = (list: Example[]) => list.slice(0, perKind).map(e => packExample(e, numberOf, tokenBytes, scale));
      return { ...component, examples: { scale, top: pack(top), random: pack(random) } };
    });
    const texts = Object.values(vocabulary);
    return asciiJson({ ...run, harvest: { ...rest, ids, texts, tokenBytes, components: packed } });
  };
  const [none, one] = [inline(0), inline(1)].map(json => json.length) as [number, number];
  const room = (MAX_REPORT_BYTES - template.length - none) / Math.max(1, one - none);
  return before + inline(Math.max(1, Math.floor(room))) + after;
}

/** JSON in which nothing can end a script, start a comment or turn the reading direction: plain ASCII without <>&. */
export function asciiJson(value: unknown): string {
  const escaped = (char: string) => `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`;
  return JSON.stringify(value).replace(/[<>&\u007f-\uffff]/g, escaped);
}

/**
 * [row, start, at, base64]: first the tokens (their numbers, little-endian), then a byte of CI each (255 is 1), then a
 * signed byte of activation each (127 is the largest of the component's examples).
 */
function packExample(
  { row, start, at, tokens, ci, activation }: Example,
  numberOf: Map<number, number>,
  tokenBytes: number,
  scale: number,
): [number, number, number, string] {
  const L = tokens.length;
  const bytes = Buffer.alloc((tokenBytes + 2) * L);
  for (let k = 0; k < L; k++) {
    bytes.writeUIntLE(numberOf.get(tokens[k]!)!, tokenBytes * k, tokenBytes);
    bytes.writeUInt8(Math.ceil(ci[k]! * 255), tokenBytes * L + k); // up: what fires must not look like 0
    bytes.writeInt8(Math.round((activation[k]! / scale) * 127), (tokenBytes + 1) * L + k);
  }
  return [row, start, at, bytes.toString('base64')];
}

/** What the harvest reads of a run. */
export function harvestPass(problem: Problem, params: Params): HarvestPass {
  return tokens => {
    const { pass, g } = importances(problem, params, tokens);
    const activation = problem.modules.map(m => {
      const norms = tf.sqrt(tf.sum(tf.square(U(params, m)), 1)); // ‖U_c‖ [C]
      return tf.mul(matmul(pass.acts[m.path]!, V(params, m)), norms);
    });
    return { ci: g, activation: tf.concat(activation, 1), probs: pass.probs };
  };
}

/** Harvests a run and writes harvest.json and report.html into its folder. */
async function harvestRun(
  engine: Engine,
  problem: Problem,
  params: Params,
  data: Data,
  scoreboard: Scoreboard | undefined,
) {
  const { target, modules, config } = problem;
  const rows = firstRows(data.train, config.harvestRows || data.train.count);
  const show = startProgress(rows.count * rows.seqLen, 0, 'token');
  const result = await harvest({
    ...{ pass: harvestPass(problem, params), engine, modules: [...modules], vocabSize: target.arch.vocab, rows },
    tokenText: id => tokenText(data.tokenizer, id),
    passages: range(0, Math.min(8, data.heldOut.count)).map(data.heldOut.row),
    settings: { seed: config.seed },
    progress: positions => show(positions, () => `harvest ${positions} tokens`),
  });
  writeAtomic(path.join(config.out, 'harvest.json'), JSON.stringify(result));
  const template = fileURLToPath(new URL('assets/report.html', import.meta.url));
  if (!fs.existsSync(template)) return talk('no page: assets/report.html is not here');
  const history = readMetrics(config.out);
  const record = readJson(path.join(config.out, 'config.json'));
  const metrics = history.findLast(line => 'eval/ce_kl/ce_target' in line) ?? {};
  const run: ReportData = {
    config: record,
    metrics,
    history,
    ...(scoreboard ? { scoreboard: { ...scoreboard } } : {}),
    harvest: result,
  };
  writeAtomic(path.join(config.out, 'report.html'), renderReport(readText(template), run));
}

/** A token as text, with its leading space. */
function tokenText(tokenizer: Tokenizer | undefined, id: number): string {
  const token = tokenizer?.id_to_token(id);
  if (tokenizer === undefined || token === undefined) return `#${id}`;
  if (token.includes('▁')) return token.replaceAll('▁', ' ');
  return tokenizer.decode([id], { skip_special_tokens: false }) || token;
}

// ---- N. Command line ------------------------------------------------------------------------------------------------
// Standard output is the result, standard error the talk. Exit codes: 0, 1 failed, 2 bad input, 130/143 interrupted.

const talk = (line: string): void => void process.stderr.write(`${line}\n`);

/** A long loop's progress: one line that is rewritten on a terminal, a plain line now and then elsewhere. */
function startProgress(total: number, first = 0, unit = 'step') {
  const started = performance.now();
  const live = process.stderr.isTTY === true;
  let shown = -Infinity;
  return (done: number, text: () => string): void => {
    const now = performance.now();
    if (done !== total && now - shown < (live ? 100 : 10_000)) return;
    shown = now;
    const perStep = (now - started) / Math.max(1, done - first);
    const left = Math.round((perStep * (total - done)) / 1000);
    const line = `${text()}  ${perStep.toPrecision(3)} ms/${unit}  ${Math.floor(left / 60)}:${String(left % 60).padStart(2, '0')} left`;
    process.stderr.write(live ? `\r\x1b[K${line}${done === total ? '\n' : ''}` : `${line}\n`);
  };
}

/** Fills in what is "auto" and checks what one field alone can't tell. `given`: fields set by the user or a preset. */
export function resolveConfig(config: Config, arch: Architecture, given: ReadonlySet<string>, gpu: boolean): Config {
  const c = { ...config };
  if (!given.has('batchSize') && !gpu) c.batchSize = 2;
  if (!given.has('seqLen')) c.seqLen = Math.min(c.seqLen, arch.context);
  // the paper's CI function is 8/3 as wide as its target and twice as deep; so is the small public preset's
  c.ciNHeads ||= Math.min(16, Math.max(4, Math.round((arch.dModel * 8) / 3 / 64)));
  c.ciDModel ||= Math.max(1, Math.round((arch.dModel * 8) / 3 / (8 * c.ciNHeads))) * 8 * c.ciNHeads;
  c.ciNBlocks ||= 2 * arch.nLayers;
  c.ciMlpHidden ||= 4 * c.ciDModel;
  c.evalBatchSize ||= c.batchSize;
  const { batchSize, microBatches, ciDModel, ciNHeads, seqLen } = c;
  if (batchSize % microBatches !== 0)
    refuse(`--micro-batches ${microBatches} does not divide --batch-size ${batchSize}`);
  if (ciDModel % (2 * ciNHeads) !== 0)
    refuse(`--ci-d-model ${ciDModel} is no even number for each of ${ciNHeads} --ci-n-heads`);
  if (seqLen > arch.context) refuse(`--seq-len ${seqLen}: the target's ${arch.contextField} is ${arch.context}`);
  return c;
}

/** A folder as it is; a hub id through the Hugging Face cache. */
async function resolveModel(spec: string): Promise<string> {
  if (fs.existsSync(spec)) return spec;
  const hub = await optional(import('./engine/hub.ts'));
  return hub ? hub.resolveModel(spec) : refuse(`${spec}: no such folder; hub ids need engine/hub.ts`);
}

/** What every job starts with: engine, target, data, modules; last the target's own loss: a wrongly loaded model shows. */
async function open(config: Config, given: ReadonlySet<string>, preset?: Preset) {
  if (!config.model) refuse('--model: missing; takes a Hugging Face folder or a hub id (or give a --preset)');
  if (!config.data) refuse('--data: missing; takes a .txt, .jsonl or .json file');
  const engine = await startEngine(config);
  talk(`engine   ${engine.description}`);
  const target = loadTarget(await resolveModel(config.model));
  const { type, nLayers, dModel, vocab } = target.arch;
  talk(`target   ${config.model}: ${type}, ${nLayers} layers, width ${dModel}, vocabulary ${vocab}`);
  for (const [field, meant] of Object.entries(preset?.target ?? {})) {
    const got = target.arch[field as keyof Architecture];
    if (got !== meant) talk(`warning  this preset is meant for a target with ${field} ${meant}; this one has ${got}`);
  }
  const c = resolveConfig(config, target.arch, given, engine.gpu);
  const data = await loadData(target, c);
  c.seqLen = data.train.seqLen;
  talk(`data     ${data.train.count} training rows, ${data.heldOut.count} held-out rows of ${c.seqLen} tokens`);
  const problem: Problem = { target, modules: chooseModules(target.linears, c.components), config: c };
  talk(
    `modules  ${problem.modules.length} of ${target.linears.length} linear layers, ${totalC(problem.modules)} components`,
  );
  const heldOut = firstRows(data.heldOut, c.evalBatchSize);
  const tokens = tokenBatch(heldOut, range(0, heldOut.count));
  const loss = tf.tidy(() => crossEntropy(targetPass(target, tokens).logProbs, tokens));
  const targetLoss = (await loss.data())[0]!;
  tf.dispose([loss, tokens]);
  talk(`loss     ${targetLoss.toFixed(4)} nats per token, the target's own on ${heldOut.count} held-out rows`);
  return { engine, problem, data, heldOut, targetLoss };
}

/** Says what a step will take, and refuses what can't fit. */
function checkSize(problem: Problem, gpu: boolean): void {
  const { targetParams, components, ciFn, bytes, flops } = estimate(problem);
  const [M, G] = [(x: number) => `${(x / 1e6).toFixed(2)}M`, (x: number) => `${(x / 2 ** 30).toFixed(2)} GiB`];
  talk(`size     target ${M(targetParams)} parameters, V and U ${M(components)}, CI function ${M(ciFn)}`);
  talk(`step     about ${G(bytes)} of memory, ${(flops / 1e9).toFixed(1)} GFLOP`);
  const smi = gpu
    ? spawnSync('nvidia-smi', ['--query-gpu=memory.total', '--format=csv,noheader,nounits']).stdout
    : null;
  const there = gpu ? Number.parseInt(smi?.toString() ?? '', 10) * 2 ** 20 : os.totalmem();
  if (bytes <= there || Number.isNaN(there)) return;
  const { microBatches, batchSize } = problem.config;
  const advice =
    batchSize > microBatches
      ? `a larger --micro-batches than ${microBatches}`
      : 'a smaller --seq-len or fewer --components';
  refuse(`a step takes about ${G(bytes)} and there are ${G(there)}: try ${advice}, or a smaller --batch-size`);
}

/** --labels: the rules in force in the first rows of the held-out data. */
function readLabels(file: string, rows: Rows): Labels {
  const { rules, labels } = readJson(file) as unknown as Labels;
  const row = (r: unknown) =>
    Array.isArray(r) && r.length === rows.seqLen && r.flat().every(id => rules[id] !== undefined);
  if (Array.isArray(rules) && Array.isArray(labels) && labels.length <= rows.count && labels.every(row))
    return { rules, labels };
  return refuse(
    `${file}: takes {"rules": [{"name"}…], "labels": [row][position][rule ids]} for the rows of --eval-data`,
  );
}

/** --dry-run: lists the modules, times some steps, writes nothing. */
async function measureSteps(engine: Engine, problem: Problem, data: Data): Promise<number> {
  for (const { path: name, dIn, dOut, C } of problem.modules) console.log(`${name}  [${dOut}, ${dIn}]  C ${C}`);
  const step = compileStep(engine, problem, initialState(problem, initialParams(problem)));
  const times: number[] = [];
  for (let n = 0; n < 7; n++) {
    const started = performance.now();
    await step(n, data.train);
    times.push(performance.now() - started);
  }
  const typical = times.slice(2).sort((a, b) => a - b)[2]!; // the first two are traced and checked
  const hours = (typical * problem.config.nSteps) / 3.6e6;
  console.log(`${typical.toFixed(1)} ms per step: ${problem.config.nSteps} steps take ${hours.toFixed(2)} hours`);
  return 0;
}

interface JobOptions {
  dryRun: boolean;
  resume?: RunRecord;
  preset?: Preset | undefined;
}

/** The main job: warm up, train, evaluate, save, score, harvest, report. */
async function decompose(config: Config, given: ReadonlySet<string>, how: JobOptions): Promise<number> {
  const { resume } = how;
  const { engine, problem, data, heldOut } = await open(config, given, how.preset);
  const { config: c } = problem;
  checkSize(problem, engine.gpu);
  if (how.dryRun) return measureSteps(engine, problem, data);
  const labels = c.labels ? readLabels(c.labels, data.heldOut) : undefined;
  const record = runRecord(problem, data, engine);
  if (resume) for (const warning of compareRuns(resume, record)) talk(`warning  ${warning}`);
  fs.mkdirSync(c.out, { recursive: true });
  const inRun = (file: string) => path.join(c.out, file);
  writeAtomic(inRun('config.json'), `${JSON.stringify(record, null, 1)}\n`);

  const params = initialParams(problem);
  const state = initialState(problem, params);
  let start = 0;
  const checkpoint = resume && loadCheckpoint(c.out);
  if (resume && !checkpoint) {
    talk('resume   from the start: this run was stopped before its first checkpoint');
    fs.rmSync(inRun('metrics.jsonl'), { force: true });
  }
  if (checkpoint) {
    if (checkpoint.warning) talk(`warning  ${checkpoint.warning}`);
    start = checkpoint.step;
    restore(checkpoint.components, params);
    restore(checkpoint.state, state.m, 'adam.m.');
    restore(checkpoint.state, state.v, 'adam.v.');
    restore(checkpoint.state, state.sources, 'ppgd.');
    const kept = readMetrics(c.out).filter(({ step }) => step! <= start);
    writeAtomic(inRun('metrics.jsonl'), kept.map(line => `${JSON.stringify(line)}\n`).join(''));
    talk(`resume   from step ${start}`);
  }
  const save = (step: number) => saveCheckpoint(c.out, step, toWrite(params), stateToWrite(state));
  const log = (step: number, metrics: Metrics) => {
    fs.appendFileSync(inRun('metrics.jsonl'), `${JSON.stringify({ step, ...metrics })}\n`);
  };
  const signals = watchSignals(talk);
  let interrupted: number | undefined;
  if (!checkpoint && c.faithfulnessWarmupSteps > 0) {
    const show = startProgress(c.faithfulnessWarmupSteps);
    await warmUp(engine, problem, state, async (done, loss) => {
      show(done, () => `warm-up ${done}/${c.faithfulnessWarmupSteps}  faithfulness ${loss.toExponential(2)}`);
      await checkFinite(done, { 'warm-up loss/faith': loss }, toWrite(params));
      interrupted = await signals.interrupted();
      return interrupted === undefined;
    });
    // there is nothing to save yet: --resume begins again
    if (interrupted !== undefined) return interrupted;
  }
  const step = compileStep(engine, problem, state);
  const evaluate = compileEvaluation(engine, problem, params);
  const show = startProgress(c.nSteps, start);
  let evaluated: Metrics | undefined;
  for (let n = start; n < c.nSteps && interrupted === undefined; n++) {
    const started = performance.now();
    const values = await step(n, data.train);
    const metrics: Metrics = Object.fromEntries(STEP_METRICS.map((name, i) => [name, values[i]!]));
    const done = n + 1;
    await checkFinite(done, metrics, toWrite(params));
    const due = (every: number) => done === c.nSteps || (every > 0 && done % every === 0);
    const losses = () => LOSSES.map(l => `${l} ${metrics[`loss/${l}`]!.toPrecision(3)}`).join('  ');
    show(done, () => `step ${done}/${c.nSteps}  ${losses()}  L0 ${metrics['train/l0']!.toFixed(1)}`);
    if (done % c.logEvery === 0 || done === c.nSteps) {
      const { lrMain, lrPpgd, p } = schedule(c, n);
      const { numTensors, numBytes } = tf.memory();
      const memory = { 'memory/tensors': numTensors, 'memory/bytes': numBytes };
      log(done, {
        ...metrics,
        'lr/main': lrMain,
        'lr/ppgd': lrPpgd,
        p,
        'time/ms_per_step': performance.now() - started,
        ...memory,
      });
    }
    if (due(c.evalFreq)) {
      // before the save: what a resumed run finds in metrics.jsonl up to its step is then complete
      const slow = done === c.nSteps || (c.slowEvalFreq > 0 && done % c.slowEvalFreq === 0);
      evaluated = (await evaluate(heldOut, { step: done, slow })).metrics;
      log(done, evaluated);
    }
    interrupted = await signals.interrupted();
    if (due(c.saveEvery) || interrupted !== undefined) await save(done);
  }
  signals.stop();
  if (interrupted !== undefined) {
    talk(`stopped; go on with --resume --out ${c.out}`);
    return interrupted;
  }
  // a run that was complete already and is resumed has nothing evaluated yet
  const metrics = evaluated ?? (await evaluate(heldOut, { step: c.nSteps, slow: true })).metrics;
  const board = labels && (await tidyAsync(() => scoreRules(engine, problem, params, data.heldOut, labels)));
  console.log(summary(problem, metrics, board));
  if (c.harvest) await harvestRun(engine, problem, params, data, board);
  console.log(`\nRun folder: ${c.out}   peak memory: ${(process.resourceUsage().maxRSS / 2 ** 20).toFixed(2)} GiB`);
  return 0;
}

/** The lines of metrics.jsonl. */
const readMetrics = (dir: string): Metrics[] => {
  const file = path.join(dir, 'metrics.jsonl');
  const lines = fs.existsSync(file) ? readText(file).split('\n') : [];
  return lines.filter(line => line.endsWith('}')).map(line => parseJson(line, file) as Metrics); // not one cut off
};

/** The final numbers, for people. */
function summary({ modules, config }: Problem, metrics: Metrics, board: Scoreboard | undefined): string {
  const value = (name: string) => metrics[`eval/${name}`]!;
  const number = (x: number) => (Math.abs(x) >= 1e-3 ? x.toFixed(4) : x.toExponential(2)).padStart(10);
  const strategies = { unmasked: 'everything on', ci_masked: 'CI masks', rounded_masked: 'rounded CI masks' };
  const all = {
    ...strategies,
    stoch_masked: 'stochastic masks',
    random_masked: 'random masks',
    zero_masked: 'nothing on',
  };
  const line = (name: string, label: string) => {
    const ce = value('ce_kl/ce_target') + value(`ce_kl/ce_difference_${name}`);
    return `  ${label.padEnd(18)}${number(ce)}${number(value(`ce_kl/kl_${name}`))}`;
  };
  const lines = [
    `\n${''.padEnd(20)}        CE        KL   (nats per token, held-out rows)`,
    `  ${'the target'.padEnd(18)}${number(value('ce_kl/ce_target'))}`,
    ...Object.entries(all).map(([name, label]) => line(name, label)),
    `  ${'dead ones deleted'.padEnd(28)}${number(value('ce_kl/kl_alive'))}`,
    `  ${`fresh PGD, ${config.pgdEvalNSteps} steps`.padEnd(28)}${number(value('loss/PGDReconLoss'))}`,
    `  faithfulness ${value('loss/FaithfulnessLoss').toExponential(2)}`,
    `  L0 ${Object.entries(metrics)
      .find(([n]) => /^eval\/l0\/[\d.]+_total$/.test(n))![1]
      .toFixed(2)} of ` + `${value('n_alive')} alive of ${totalC(modules)} components`,
  ];
  if (!board) return lines.join('\n');
  const best = board.rules.map(({ name, component: { module, index }, precision, recall, f1, causal }) => {
    const [p, r, f] = [precision, recall, f1].map(x => x.toFixed(2).padStart(10));
    return `  ${name.padEnd(18)}${p}${r}${f}   ${module}:${index}${causal ? '  causal' : ''}`;
  });
  return [
    ...lines,
    `\n  ${'rule'.padEnd(18)} precision    recall        F1   best component`,
    ...best,
    `  mean F1 ${board.meanF1.toFixed(3)}; ${board.nF1AtLeast80} of ${board.rules.length} rules with F1 of at least 0.8; ${board.nCausal} causal`,
  ].join('\n');
}

/** Refuses to resume with another config, model or data; warnings for what costs exactness. */
function compareRuns(old: RunRecord, now: RunRecord): string[] {
  for (const part of ['model', 'data'] as const) {
    if (old[part].sha256 !== now[part].sha256)
      refuse(`--resume: ${part} is not the one of this run (${old[part].path}): its SHA-256 differs`);
  }
  // "auto" may have been another engine then
  const fields = ({ config, engine, modules }: RunRecord) => ({ ...config, engine: engine.name, modules });
  return compareConfigs(fields(old), fields(now));
}

/** A finished run, opened again with its own config. */
async function reopen(dir: string, changes: Partial<Config>) {
  const record = readJson(path.join(dir, 'config.json')) as unknown as RunRecord;
  if (record.formatVersion !== 1) refuse(`${dir}/config.json: formatVersion is ${record.formatVersion}, takes 1`);
  const config = { ...DEFAULTS, ...record.config, out: dir, ...changes };
  const { engine, problem, data, heldOut } = await open(config, new Set(Object.keys(config)));
  if (problem.target.sha256 !== record.model.sha256)
    refuse(`${record.model.path}: not the model of this run (its SHA-256 differs)`);
  const params = initialParams(problem);
  restore(pairFile(dir, 'components'), params);
  return { engine, problem, data, heldOut, params };
}

async function evalCommand(dir: string, changes: Partial<Config>): Promise<number> {
  const { engine, problem, data, heldOut, params } = await reopen(dir, changes);
  // given rows are one batch, since the importance loss is no mean over batches; --eval-batch-size splits them
  if (changes.evalData && !changes.evalBatchSize) problem.config.evalBatchSize = data.heldOut.count;
  const rows = changes.evalData ? data.heldOut : heldOut;
  const evaluate = compileEvaluation(engine, problem, params);
  console.log(JSON.stringify((await evaluate(rows, { step: problem.config.nSteps, slow: true })).metrics));
  return 0;
}

async function harvestCommand(dir: string, changes: Partial<Config>): Promise<number> {
  const { engine, problem, data, params } = await reopen(dir, changes);
  const { labels } = problem.config;
  const board =
    labels && !changes.evalData
      ? await scoreRules(engine, problem, params, data.heldOut, readLabels(labels, data.heldOut))
      : undefined;
  await harvestRun(engine, problem, params, data, board);
  return 0;
}

function help(): string {
  const lines = Object.entries(GROUPS).flatMap(([group, fields]) => [
    `\n${group}:`,
    ...Object.entries(fields as Record<string, Field<Value>>).map(([name, { value, help }]) => {
      const standard = value === '' || typeof value === 'boolean' ? '' : ` [${value}]`;
      return `  --${`${typeof value === 'boolean' ? 'no-' : ''}${kebab(name)}`.padEnd(36)} ${help}${standard}`;
    }),
  ]);
  const presets = Object.entries(PRESETS).map(([name, { source }]) => `  ${name.padEnd(17)} ${source}`);
  return `nano-param-decomp ${VERSION}: takes a trained language model apart into rank-one subcomponents

  npx tsx nano-param-decomp.ts [decompose] --model M --data D [--preset P] [flags]
  npx tsx nano-param-decomp.ts [decompose] --resume --out DIR     goes on exactly where DIR stopped
  npx tsx nano-param-decomp.ts [decompose] … --dry-run            checks, estimates and times a step, writes nothing
  npx tsx nano-param-decomp.ts eval --run DIR [--eval-data rows.json]
  npx tsx nano-param-decomp.ts harvest --run DIR [--data D]       (re)builds harvest.json and report.html

Presets (--preset):
${presets.join('\n')}
${lines.join('\n')}
`;
}

/** Parses and runs a command line. @returns the exit code */
export async function main(argv: string[]): Promise<number> {
  const [command = 'decompose', ...rest] = /^(decompose|eval|harvest)$/.test(argv[0] ?? '')
    ? argv
    : ['decompose', ...argv];
  const options: Record<string, { type: 'string' | 'boolean' }> = {};
  for (const name of ['preset', 'run']) options[name] = { type: 'string' };
  for (const name of ['resume', 'dry-run', 'help', 'version']) options[name] = { type: 'boolean' };
  for (const [name, { value }] of Object.entries(FIELDS)) {
    options[typeof value === 'boolean' ? `no-${kebab(name)}` : kebab(name)] = {
      type: typeof value === 'boolean' ? 'boolean' : 'string',
    };
  }
  let flags: Record<string, string | boolean | undefined>;
  try {
    flags = parseArgs({ args: rest, options, strict: true }).values as typeof flags;
  } catch (error) {
    return refuse(`${(error as Error).message.split('. To specify')[0]} (--help lists the flags)`);
  }
  if (flags.help || flags.version) {
    console.log(flags.help ? help() : VERSION);
    return 0;
  }
  const changes: Partial<Config> = {};
  for (const [name, { value }] of Object.entries(FIELDS)) {
    const raw = typeof value === 'boolean' ? flags[`no-${kebab(name)}`] && false : flags[kebab(name)];
    if (raw !== undefined) Object.assign(changes, { [name]: fieldValue(name, raw) });
  }
  for (const name of ['model', 'data', 'evalData', 'labels', 'out'] as const) {
    if (changes[name] && fs.existsSync(changes[name])) changes[name] = path.resolve(changes[name]);
  }
  if (command !== 'decompose') {
    if (typeof flags.run !== 'string') return refuse(`${command}: takes --run DIR, the folder of a finished run`);
    return command === 'eval' ? evalCommand(flags.run, changes) : harvestCommand(flags.run, changes);
  }
  const dryRun = flags['dry-run'] === true;
  if (flags.resume) {
    if (!changes.out) return refuse('--resume: takes --out DIR, the folder of the run to go on with');
    const record = readJson(path.join(changes.out, 'config.json')) as unknown as RunRecord;
    const config = { ...DEFAULTS, ...record.config, ...changes };
    return decompose(config, new Set(Object.keys(config)), { dryRun, resume: record });
  }
  const presetName = flags.preset as string | undefined;
  const preset = presetName === undefined ? undefined : PRESETS[presetName];
  if (presetName !== undefined && !preset)
    refuse(`--preset: got ${presetName}, takes one of ${Object.keys(PRESETS).join(', ')}`);
  const config: Config = { ...DEFAULTS, ...preset?.config, ...changes };
  const stamp = new Date().toISOString().slice(0, 19).replace(/\D/g, '-');
  config.out ||= path.join('runs', `${path.basename(config.model) || 'run'}-${stamp}`);
  if (fs.existsSync(path.join(config.out, 'config.json')))
    refuse(`${config.out}: holds a run; --resume goes on with it, or take another --out`);
  const given = new Set([...Object.keys(preset?.config ?? {}), ...Object.keys(changes)]);
  return decompose(config, given, { dryRun, preset });
}

if (process.argv[1] && fs.realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  main(process.argv.slice(2)).then(
    code => {
      process.exitCode = code;
    },
    (error: NodeJS.ErrnoException) => {
      const usage = error.name === 'UsageError';
      // what the system says (a full disk …) is no bug of ours: its stack tells nothing
      const known = usage || error instanceof DivergenceError || /^E[A-Z]+$/.test(error.code ?? '');
      talk(known ? `nano-param-decomp: ${error.message}` : String(error.stack));
      process.exitCode = usage ? 2 : 1;
    },
  );
}
