/**
 * nano-param-decomp: adversarial parameter decomposition (VPD) of a trained language model, in one file.
 *
 * Every weight matrix of the target is written as a sum of rank-one subcomponents, and a small transformer (the
 * causal-importance function) learns which few of them each token really needs: whatever it calls unimportant may be
 * removed, at random or by an adversary, and the model must still say the same. What is left is the network taken
 * apart into small mechanisms that can be looked at one by one.
 *
 *   npm install && npm start                        the bundled toy target: decompose, evaluate, harvest, page
 *   npx tsx nano-param-decomp.ts --model M --data D  your own: a Hugging Face folder or hub id, and a text file
 *   npx tsx nano-param-decomp.ts --help              every field of the config is a flag
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
 *   I. Optimisation      schedules, Adam, the training step, the loop             method 5
 *   J. Evaluation        the original's metrics, and ours                         method 6
 *   K. Run folder        checkpoints, metrics, resume
 *   L. Harvest           what every component does
 *   M. Report            harvest.json and report.html
 *   N. Command line
 *
 * Left out on purpose: several GPUs, embeddings and unembeddings as modules, targets other than decoder language
 * models, hyperparameter search, experiment trackers.
 *
 * Conventions: N = B·S positions, all activations are [N, ·] matrices (only attention unfolds B and S). C components
 * per module; ΣC are the components of all M modules side by side, modules sorted by path ("wide" tensors).
 */

import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { Tokenizer } from '@huggingface/tokenizers';
import * as tf from '@tensorflow/tfjs';

/** A tensor with its axes named for the reader: T<'N dIn'>. */
export type T<_Axes extends string = string> = tf.Tensor;
type Tensors = Record<string, tf.Tensor>;

/** Wrong input (a flag, a file, a folder): reported in one line, exit code 2. */
export class UsageError extends Error {}

// ---- A. Config ------------------------------------------------------------------------------------------------------
// One record gives every field its type, default, flag (kebab-case), bounds and line in --help. The defaults are the
// paper's run (method 5); "0 = auto" are sizes that follow the target by a rule that gives the paper's at its target.

interface Field<V> {
  value: V;
  help: string;
  min?: number;
  max?: number;
  integer?: boolean;
  choices?: readonly string[];
}
const int = (value: number, help: string, min = 0, max = 1e9): Field<number> => ({
  value,
  help,
  min,
  max,
  integer: true,
});
const real = (value: number, help: string, min = 0, max = 1e12): Field<number> => ({ value, help, min, max });
const text = (value: string, help: string): Field<string> => ({ value, help });
const choice = (value: string, choices: readonly string[], help: string): Field<string> => ({
  value,
  help,
  choices,
});
const flag = (value: boolean, help: string): Field<boolean> => ({ value, help });

export const FIELD_GROUPS = {
  'Target and data': {
    model: text(
      '',
      'Hugging Face folder (config.json, *.safetensors, tokenizer.json) or hub id org/name[@revision]',
    ),
    data: text('', 'training data: .txt, .jsonl or .json rows of ids'),
    evalData: text('', 'held-out data; without it the last 5 % of the documents, never trained on'),
    labels: text(
      '',
      'JSON: the rules in force at every position of --eval-data, for the mechanism scoreboard',
    ),
    seqLen: int(512, 'tokens in a row (no longer than the target allows)', 2, 1 << 20),
    components: text(
      'auto',
      'modules and their C, first match wins: "*.q_proj=64,*.mlp.*=172"; auto: every linear layer of the blocks, C = max(dIn, dOut)',
    ),
    out: text('', 'run folder; without it runs/<model>-<time>'),
  },
  Training: {
    nSteps: int(400_000, 'training steps', 1),
    batchSize: int(64, 'rows in a batch (not given on a CPU engine: 4)', 1),
    microBatches: int(
      1,
      'shards that a batch is split into, one after another (R of the importance loss)',
      1,
    ),
    seed: int(0, 'every random number comes from (seed, step, purpose)', 0, 2 ** 31 - 1),
    mainLr: real(5e-5, 'AdamW learning rate of V, U and the CI function'),
    mainLrFinalFrac: real(0.1, 'where its cosine ends', 0, 1),
    gradClipComponents: real(0.01, 'joint gradient norm of all V and U is clipped to this; 0 = off'),
    gradClipCi: real(0, "the same for the CI function; 0 = off, the paper's choice"),
    faithfulnessWarmupSteps: int(400, 'steps on the faithfulness loss alone, before training'),
    faithfulnessWarmupLr: real(1e-3, 'their learning rate'),
    faithfulnessWarmupLrFinalFrac: real(1, 'where its cosine ends; 1 = constant', 0, 1),
  },
  Losses: {
    coeffFaith: real(1e7, 'coefficient of the faithfulness loss'),
    coeffImp: real(2e-4, 'coefficient of the importance-minimality loss'),
    coeffStoch: real(0.5, 'coefficient of the stochastic reconstruction loss'),
    coeffPpgd: real(0.5, 'coefficient of the adversarial reconstruction loss; 0 = no adversary'),
    pStart: real(2, 'exponent p of the importance loss at the start', 0, 10),
    pEnd: real(0.4, 'and at the end (linear)', 0, 10),
    impEps: real(1e-12, 'added to g before the power: its slope at 0 is infinite when p < 1'),
    impBeta: real(0.5, 'weight of the frequency term'),
    leakyAlpha: real(0.01, 'slope of the leaky sigmoids outside [0, 1]', 0, 1),
  },
  'CI function': {
    ciDModel: int(
      0,
      'width; 0 = auto: 8/3 of the target width (paper: 2048 at 768), a multiple of 16 a head',
    ),
    ciNBlocks: int(0, 'blocks; 0 = auto: twice the target layers (paper: 8 at 4)'),
    ciNHeads: int(0, 'heads; 0 = auto: one per 64 of width, at least 4, at most 16'),
    ciMlpHidden: int(0, 'MLP width; 0 = auto: 4 times the width'),
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
    evalBatchSize: int(0, 'rows of an evaluation batch; 0 = auto: the batch size', 0),
    ciAliveThreshold: real(0, 'a component counts in L0 where g is above this', 0, 1),
    roundingThreshold: real(0, 'rounded masks are 1 where g is above this', 0, 1),
    pgdEvalStepSize: real(0.1, 'step of the fresh sign-PGD adversary'),
    pgdEvalNSteps: int(20, 'its steps', 0, 10_000),
  },
  Run: {
    logEvery: int(100, 'steps between lines of metrics.jsonl', 1),
    saveEvery: int(5000, 'steps between checkpoints; 0 = only at the end'),
    harvest: flag(true, 'harvest and write the page at the end'),
    harvestRows: int(2000, 'rows that the harvest reads; 0 = all'),
  },
  Engine: {
    engine: choice(
      'auto',
      ['auto', 'tensorflow', 'webgpu', 'wasm'],
      'auto: TensorFlow if it loads, else WASM',
    ),
    precision: choice(
      'auto',
      ['auto', 'float32', 'tf32', 'bf16'],
      'of matrix products; auto: tf32 on CUDA, else float32',
    ),
    graph: flag(true, 'trace the step into a TensorFlow graph (6x faster); --no-graph runs it op by op'),
    xla: choice(
      'auto',
      ['auto', 'on', 'off'],
      'compile the graph with XLA; auto: when enough steps follow to pay for it',
    ),
    threads: int(0, 'threads of the TensorFlow CPU engine; 0 = all cores', 0, 1024),
  },
} as const;

type Groups = typeof FIELD_GROUPS;
type Merge<U> = (U extends unknown ? (u: U) => void : never) extends (i: infer I) => void ? I : never;
type Fields = Merge<Groups[keyof Groups]>;
/** Every field with its value: what config.json stores. */
export type Config = { -readonly [K in keyof Fields]: Fields[K] extends Field<infer V> ? V : never };

const FIELDS = Object.assign({}, ...Object.values(FIELD_GROUPS)) as Record<
  keyof Config,
  Field<string | number | boolean>
>;
export const DEFAULTS = Object.fromEntries(Object.entries(FIELDS).map(([k, f]) => [k, f.value])) as Config;

/** Named settings. Each is the difference to the defaults; its source stands beside it and in --help. */
export const PRESETS: Record<string, { source: string; config: Partial<Config> }> = {
  toy: {
    source: 'ours: the bundled one-layer target with known rules, 2,000 steps (README.md, "Results")',
    config: {
      model: fileURLToPath(new URL('assets/toy', import.meta.url)),
      data: fileURLToPath(new URL('assets/toy/corpus.txt', import.meta.url)),
      evalData: fileURLToPath(new URL('assets/toy/eval.json', import.meta.url)),
      labels: fileURLToPath(new URL('assets/toy/labels.json', import.meta.url)),
      components: '*.attn.*=48,*.mlp.*=128',
      ...{
        seqLen: 32,
        batchSize: 16,
        nSteps: 2000,
        mainLr: 1e-2,
        coeffFaith: 1e4,
        coeffImp: 5e-4,
        impBeta: 4,
      },
      ...{ faithfulnessWarmupLr: 5e-3, faithfulnessWarmupLrFinalFrac: 0.05, ppgdLr: 0.05 },
      ...{ ciDModel: 64, ciNBlocks: 1, ciNHeads: 4, ciMlpHidden: 256 },
      ...{ evalFreq: 500, slowEvalFreq: 0, evalBatchSize: 256, saveEvery: 1000 },
    },
  },
  'simplestories-2L': {
    source: "the original's small public preset (SimpleStories, 2 layers); method 5",
    config: {
      components:
        '*.q_proj=288,*.k_proj=288,*.v_proj=384,*.o_proj=480,*.c_fc=1152,*.down_proj=960,*.up_proj=1152,*.gate_proj=1152',
      ...{ ciDModel: 512, ciNBlocks: 4, ciNHeads: 8, ciMlpHidden: 2048, coeffImp: 1e-3, mainLr: 3e-4 },
    },
  },
  'pile-4L': {
    source: "the paper's run (4-layer LlamaSimpleMLP on the Pile, 400k steps of 64 x 512 tokens); method 5",
    config: {
      components: '*.q_proj=512,*.k_proj=512,*.v_proj=1024,*.o_proj=1024,*.c_fc=3072,*.down_proj=3584',
      ...{ batchSize: 64, seqLen: 512, ciDModel: 2048, ciNBlocks: 8, ciNHeads: 16, ciMlpHidden: 8192 },
    },
  },
};

const kebab = (name: string) => name.replace(/[A-Z]/g, c => `-${c.toLowerCase()}`);

/** Checks one value against its field; throws a UsageError that names the flag, what it got and what it takes. */
function checkField(name: keyof Config, raw: string | number | boolean): string | number | boolean {
  const field = FIELDS[name];
  const refuse = (takes: string): never => {
    throw new UsageError(`--${kebab(name)}: got ${JSON.stringify(raw)}, takes ${takes}`);
  };
  if (typeof field.value === 'boolean') return typeof raw === 'boolean' ? raw : refuse('no value');
  if (typeof field.value === 'string') {
    if (typeof raw !== 'string') return refuse('a text');
    return !field.choices || field.choices.includes(raw) ? raw : refuse(`one of ${field.choices.join(', ')}`);
  }
  const { min = 0, max = Infinity, integer } = field;
  const value =
    typeof raw === 'number' ? raw : typeof raw === 'string' && raw.trim() !== '' ? Number(raw) : Number.NaN;
  const fits =
    Number.isFinite(value) && value >= min && value <= max && (!integer || Number.isInteger(value));
  return fits ? value : refuse(`${integer ? 'an integer' : 'a number'} from ${min} to ${max}`);
}

// ---- B. Engine ------------------------------------------------------------------------------------------------------
// The maths is plain TFJS. What makes an engine fast (the traced graph, better WASM kernels) is in engine/ and optional:
// without that folder everything runs op by op.

export interface Engine {
  readonly name: 'tensorflow' | 'webgpu' | 'wasm' | 'cpu';
  /** One line for people: what was taken, and why. */
  readonly description: string;
  readonly gpu: boolean;
  readonly version: string;
  /**
   * A function with the same meaning as `fn`, and faster where the engine can trace it: `fn` is then run once as it is
   * and from then on as one graph. So whatever changes from call to call must enter through `feeds`, and no branch of
   * JavaScript may depend on a tensor's value. `fn` may assign tf.Variables: those are the state.
   */
  compile<F extends Tensors, O extends Tensors>(name: string, fn: (feeds: F) => O): (feeds: F) => Promise<O>;
}

/** import() of a part that may be missing; any failure but its absence is passed on. */
async function optionalImport<M>(specifier: string): Promise<M | undefined> {
  try {
    return (await import(specifier)) as M;
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (code === 'ERR_MODULE_NOT_FOUND' || code === 'MODULE_NOT_FOUND') return undefined;
    throw error;
  }
}

/** Runs every function op by op: right on every engine, and what the traced graph is compared with. */
const opByOp: Pick<Engine, 'compile'> = { compile: (_name, fn) => async feeds => tf.tidy(() => fn(feeds)) };

type EngineOptions = Pick<Config, 'engine' | 'precision' | 'graph' | 'xla' | 'threads' | 'nSteps'>;

/** Starts the engine that the config asks for. @throws UsageError if that one is not there */
export async function startEngine(options: EngineOptions): Promise<Engine> {
  let why = '';
  if (options.engine === 'auto' || options.engine === 'tensorflow') {
    try {
      return await startTensorFlow(options);
    } catch (error) {
      why = (error as Error).message.split('\n')[0] ?? '';
      if (options.engine === 'tensorflow') throw new UsageError(`--engine tensorflow: ${why}`);
    }
  }
  if (options.precision === 'tf32' || options.precision === 'bf16') {
    throw new UsageError(
      `--precision ${options.precision}: only on the TensorFlow engine (${why || options.engine})`,
    );
  }
  return options.engine === 'webgpu' ? startWebGpu() : startWasm(why);
}

async function startTensorFlow(options: EngineOptions): Promise<Engine> {
  const parts = await optionalImport<typeof import('./engine/tensorflow.ts')>('./engine/tensorflow.ts');
  const graphs = await optionalImport<typeof import('./engine/graph.ts')>('./engine/graph.ts');
  // XLA compiles for some seconds and then saves a fifth to a third of each step
  const xla =
    options.graph &&
    graphs !== undefined &&
    (options.xla === 'on' || (options.xla === 'auto' && options.nSteps >= 1000));
  let version = '';
  let gpu = false;
  if (parts) {
    const precision =
      options.precision === 'auto' ? {} : { precision: options.precision as 'float32' | 'tf32' | 'bf16' };
    ({ version, gpu } = await parts.loadTensorFlow({ threads: options.threads, xla, ...precision }));
    if (options.precision === 'bf16') parts.useBf16Products();
  } else {
    await import('@tensorflow/tfjs-node-gpu' as string);
    await tf.setBackend('tensorflow');
  }
  const graph = graphs && options.graph ? new graphs.Graph({ xla, tolerance: 0.02 }) : undefined;
  const how = graph ? `traced graph${xla ? ', XLA' : ''}` : 'op by op';
  const run = graph ? { compile: graph.compile.bind(graph) as Engine['compile'] } : opByOp;
  return {
    name: 'tensorflow',
    gpu,
    version,
    ...run,
    description: `TensorFlow ${version} on ${gpu ? 'CUDA' : 'the CPU'} (${how})`,
  };
}

async function startWasm(why: string): Promise<Engine> {
  const because = why ? `; TensorFlow: ${why}` : '';
  const parts = await optionalImport<typeof import('./engine/wasm.ts')>('./engine/wasm.ts');
  try {
    if (parts) {
      await parts.loadWasm();
      parts.fastWasmKernels();
    } else {
      await import('@tensorflow/tfjs-backend-wasm');
      await tf.setBackend('wasm');
    }
    return {
      name: 'wasm',
      gpu: false,
      version: tf.version.tfjs,
      ...opByOp,
      description: `TFJS ${tf.version.tfjs} on WASM${because}`,
    };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ERR_MODULE_NOT_FOUND') throw error;
    await tf.setBackend('cpu');
    const description = `TFJS ${tf.version.tfjs} in plain JavaScript, slow: no @tensorflow/tfjs-backend-wasm${because}`;
    return { name: 'cpu', gpu: false, version: tf.version.tfjs, ...opByOp, description };
  }
}

async function startWebGpu(): Promise<Engine> {
  try {
    // Node has no GPU object of its own: the npm package `webgpu` (Dawn) brings one
    const { create, globals } = (await import('webgpu' as string)) as {
      create(o: string[]): unknown;
      globals: object;
    };
    Object.assign(globalThis, globals);
    Object.defineProperty(globalThis.navigator ?? {}, 'gpu', { value: create([]) });
    await import('@tensorflow/tfjs-backend-webgpu' as string);
    if (!(await tf.setBackend('webgpu'))) throw new Error('no adapter');
  } catch (error) {
    const reason = (error as Error).message.split('\n')[0];
    throw new UsageError(
      `--engine webgpu: ${reason} (npm install --no-save webgpu @tensorflow/tfjs-backend-webgpu)`,
    );
  }
  return {
    name: 'webgpu',
    gpu: true,
    version: tf.version.tfjs,
    ...opByOp,
    description: `TFJS ${tf.version.tfjs} on WebGPU`,
  };
}

/** What a random number is for. With the seed and the step it is its whole address, so a step can be replayed. */
const PURPOSE = {
  stochMask: 1,
  stochDelta: 2,
  route: 3,
  routeCount: 4,
  randomMask: 5,
  pgdInit: 6,
  shuffle: 7,
  sources: 8,
  init: 16,
} as const;

/** The part of the address that changes from step to step: a tensor, because it must enter a traced graph as a feed. */
export const randomKey = (seed: number, step: number): tf.Tensor1D =>
  tf.tensor1d([mix(seed, 0x9e3779b9), step], 'int32');

/** Uniform numbers in [0, 1) of the given shape, a function of (key, purpose) alone; each engine has its own bits. */
export function uniform(shape: number[], key: tf.Tensor, purpose: number): tf.Tensor {
  if (tf.getBackend() !== 'tensorflow') {
    const [seed = 0, step = 0] = key.dataSync();
    return tf.tensor(uniformArray(tf.util.sizeFromShape(shape), seed, step, purpose), shape);
  }
  const backend = tf.backend() as unknown as TensorFlowBackend;
  const { TF_ATTR_TYPE: type, TF_FLOAT, TF_INT32 } = backend.binding;
  const attrs = Object.entries({ dtype: TF_FLOAT, T: TF_INT32, Tseed: TF_INT32 }).map(([name, value]) => ({
    name,
    type,
    value,
  }));
  const seed = tf.add(key, tf.tensor1d([purpose, 0], 'int32'));
  return backend.executeSingleOutput('StatelessRandomUniform', attrs, [tf.tensor1d(shape, 'int32'), seed]);
}
interface TensorFlowBackend {
  binding: Record<'TF_ATTR_TYPE' | 'TF_FLOAT' | 'TF_INT32', number>;
  executeSingleOutput(op: string, attrs: object[], inputs: tf.Tensor[]): tf.Tensor;
}

/** A good 32-bit mix of two integers. */
function mix(a: number, b: number): number {
  let h = Math.imul(a ^ 0x9e3779b9, 0x85ebca6b) ^ Math.imul(b + 0x7f4a7c15, 0xc2b2ae35);
  h = Math.imul(h ^ (h >>> 16), 0x7feb352d);
  h = Math.imul(h ^ (h >>> 15), 0x846ca68b);
  return (h ^ (h >>> 16)) | 0;
}
export function uniformArray(n: number, seed: number, step: number, purpose: number): Float32Array {
  let [a, b, c, d] = [mix(seed, step), mix(step, purpose), mix(purpose, seed), 1];
  const out = new Float32Array(n);
  for (let i = -12; i < n; i++) {
    const t = (((a + b) | 0) + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (c << 21) | (c >>> 11);
    c = (c + t) | 0;
    if (i >= 0) out[i] = (t >>> 8) / 16777216;
  }
  return out;
}

// ---- C. Target model ------------------------------------------------------------------------------------------------

// A safetensors file is 8 bytes of header length, a JSON header, then the tensors' bytes side by side.

const DTYPES = 'BOOL U8 I8 F8_E5M2 F8_E4M3 U16 I16 F16 BF16 U32 I32 F32 U64 I64 F64 C64'.split(' ');
const dtypeBytes = (dtype: string) => Number(/\d+/.exec(dtype)?.[0] ?? 8) / 8; // BOOL takes a byte
const sizeOf = (shape: readonly number[]) => shape.reduce((n, d) => n * d, 1);
const isSizes = (x: unknown): x is number[] =>
  Array.isArray(x) && x.every(n => Number.isSafeInteger(n) && n >= 0);

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

/** Refuses a file of the user's. The text may be a stranger's: no control or direction marks get through. */
function refuse(file: string, what: string): never {
  throw new UsageError(`${file}: ${what}`.slice(0, 500).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '?'));
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
    if (n === 0) refuse(file, 'ends too early for a safetensors file');
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
    refuse(file, `header of ${headerBytes} bytes; at most 100 MB within the file's ${fileBytes} are read`);
  const bytes = new Uint8Array(headerBytes);
  readFully(file, fd, bytes, 8);
  let header: Record<string, { dtype?: string; shape?: unknown; data_offsets?: unknown } | null>;
  try {
    if (bytes[0] !== 0x7b) throw new Error("it must start with '{'");
    header = parseStrictJson(new TextDecoder('utf-8', { fatal: true }).decode(bytes)) as typeof header;
  } catch (error) {
    refuse(file, `the header is not strict JSON in UTF-8: ${(error as Error).message}`);
  }
  const { __metadata__: metadata = {}, ...entries } = header;
  const texts: unknown[] = metadata && !Array.isArray(metadata) ? Object.values(metadata) : [metadata];
  if (typeof metadata !== 'object' || texts.some(text => typeof text !== 'string'))
    refuse(file, '__metadata__ is not an object of strings');

  const tensors = new Map<string, TensorInfo>(); // to a Map no name is special, not even __proto__
  for (const [name, entry] of Object.entries(entries)) {
    const { dtype, shape, data_offsets: offsets, ...others } = entry ?? {};
    const tensor = `tensor "${name.slice(0, 80)}"`;
    if (!dtype || !DTYPES.includes(dtype)) refuse(file, `${tensor}: its dtype is none of ${DTYPES}`);
    if (!isSizes(shape) || !isSizes(offsets) || offsets.length !== 2 || Object.keys(others).length)
      refuse(file, `${tensor} takes dtype, shape and two data_offsets, all whole numbers, and nothing else`);
    const [begin, end] = offsets as [number, number];
    if (sizeOf(shape) * dtypeBytes(dtype) !== end - begin)
      refuse(file, `${tensor}: bytes ${begin} to ${end} are not what ${dtype} of shape [${shape}] takes`);
    tensors.set(name, { dtype, shape, begin: dataBegin + begin, end: dataBegin + end });
  }
  let covered = dataBegin;
  for (const { begin, end } of [...tensors.values()].sort((a, b) => a.begin - b.begin || a.end - b.end)) {
    if (begin !== covered) refuse(file, `overlap or hole at byte ${covered}; tensors must lie side by side`);
    covered = end;
  }
  if (covered !== fileBytes)
    refuse(file, `tensors end at byte ${covered}, not with the file at ${fileBytes}`);
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
  if (!stat?.isFile()) refuse(file, 'is not a file; a .safetensors file is expected here');
  const fd = fs.openSync(file, 'r');
  let header: ReturnType<typeof readHeader>;
  try {
    header = readHeader(file, fd, stat.size);
  } catch (error) {
    fs.closeSync(fd);
    throw error;
  }
  const find = (name: string, accepted: string[]) => {
    const tensor = header.tensors.get(name) ?? refuse(file, `has no tensor "${name}"`);
    if (!accepted.includes(tensor.dtype))
      refuse(file, `"${name}" is ${tensor.dtype}; ${accepted} can be read here`);
    return tensor;
  };
  return {
    ...header,
    readFloat32(name) {
      const { dtype, begin, end } = find(name, ['F32', 'F16', 'BF16', 'F64']);
      const out = new Float32Array((end - begin) / dtypeBytes(dtype));
      const outBits = new Uint32Array(out.buffer);
      if (dtype === 'F32') readFully(file, fd, new Uint8Array(out.buffer), begin);
      if (dtype === 'F16')
        halfFloats ??= Float32Array.from({ length: 65536 }, (_, bits) => halfToFloat(bits));
      for (let from = begin, at = 0; dtype !== 'F32' && from < end; from += 2 ** 22) {
        const bytes = new Uint8Array(Math.min(2 ** 22, end - from)); // piecewise: no second copy of the tensor
        readFully(file, fd, bytes, from);
        const values = dtype === 'F64' ? new Float64Array(bytes.buffer) : new Uint16Array(bytes.buffer);
        if (dtype === 'F64') out.set(values, at);
        else if (dtype === 'F16')
          for (let i = 0; i < values.length; i++) out[at + i] = halfFloats![values[i]!]!;
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

/** A rename survives a power cut only once its folder is on disk too. (Windows can't open folders.) */
export function syncFolder(folder: string): void {
  if (process.platform === 'win32') return;
  const fd = fs.openSync(folder, 'r');
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
  syncFolder(path.dirname(file));
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
  /** longest row: positions the model has, or its sliding window (up to which it is plain causal attention) */
  context: number;
  contextField: string;
  eps: number;
  norm: 'rms' | 'layer';
  /** inverse wavelengths of the rotated pairs of a head [rotaryDims/2]; none: learned positions */
  rotary?: Float32Array;
  qkv: 'separate' | 'concatenated' | 'per-head';
  activation: keyof typeof ACTIVATIONS;
  parallelResidual: boolean;
  tied: boolean;
  names: Names;
}

/** State-dict names without `.weight`; {i} is the layer. */
interface Names {
  embed: string;
  positions?: string;
  norm1: string;
  q: string; // the fused projection where there is one
  k?: string;
  v?: string;
  o: string;
  norm2: string;
  gate?: string;
  up: string;
  down: string;
  finalNorm: string;
  head: string;
}

const LLAMA_NAMES: Names = {
  ...{
    embed: 'model.embed_tokens',
    norm1: 'model.layers.{i}.input_layernorm',
    norm2: 'model.layers.{i}.post_attention_layernorm',
  },
  ...{
    q: 'model.layers.{i}.self_attn.q_proj',
    k: 'model.layers.{i}.self_attn.k_proj',
    v: 'model.layers.{i}.self_attn.v_proj',
  },
  ...{
    o: 'model.layers.{i}.self_attn.o_proj',
    gate: 'model.layers.{i}.mlp.gate_proj',
    up: 'model.layers.{i}.mlp.up_proj',
  },
  ...{ down: 'model.layers.{i}.mlp.down_proj', finalNorm: 'model.norm', head: 'lm_head' },
};
const ARCHITECTURES: Record<string, Names> = {
  llama: LLAMA_NAMES,
  mistral: LLAMA_NAMES,
  qwen2: LLAMA_NAMES,
  qwen3: LLAMA_NAMES,
  llama_simple_mlp: {
    ...{
      embed: 'wte',
      norm1: 'h.{i}.rms_1',
      q: 'h.{i}.attn.q_proj',
      k: 'h.{i}.attn.k_proj',
      v: 'h.{i}.attn.v_proj',
    },
    ...{
      o: 'h.{i}.attn.o_proj',
      norm2: 'h.{i}.rms_2',
      up: 'h.{i}.mlp.c_fc',
      down: 'h.{i}.mlp.down_proj',
      finalNorm: 'ln_f',
      head: 'lm_head',
    },
  },
  gpt2: {
    ...{
      embed: 'wte',
      positions: 'wpe',
      norm1: 'h.{i}.ln_1',
      q: 'h.{i}.attn.c_attn',
      o: 'h.{i}.attn.c_proj',
      norm2: 'h.{i}.ln_2',
    },
    ...{ up: 'h.{i}.mlp.c_fc', down: 'h.{i}.mlp.c_proj', finalNorm: 'ln_f', head: 'lm_head' },
  },
  gpt_neox: {
    ...{
      embed: 'gpt_neox.embed_in',
      norm1: 'gpt_neox.layers.{i}.input_layernorm',
      norm2: 'gpt_neox.layers.{i}.post_attention_layernorm',
    },
    ...{ q: 'gpt_neox.layers.{i}.attention.query_key_value', o: 'gpt_neox.layers.{i}.attention.dense' },
    ...{ up: 'gpt_neox.layers.{i}.mlp.dense_h_to_4h', down: 'gpt_neox.layers.{i}.mlp.dense_4h_to_h' },
    ...{ finalNorm: 'gpt_neox.final_layer_norm', head: 'embed_out' },
  },
};

/** tanh GELU: the same function under the names gelu_new, gelu_pytorch_tanh, gelu_fast. */
const geluTanh = (x: T): T => {
  const inner = tf.mul(Math.sqrt(2 / Math.PI), tf.add(x, tf.mul(0.044715, tf.mul(x, tf.mul(x, x)))));
  return tf.mul(tf.mul(0.5, x), tf.add(1, tf.tanh(inner)));
};
const gelu = (x: T): T => tf.mul(tf.mul(0.5, x), tf.add(1, tf.erf(tf.mul(x, Math.SQRT1_2))));
const silu = (x: T): T => tf.mul(x, tf.sigmoid(x));
const ACTIVATIONS = {
  ...{ silu, swish: silu, relu: (x: T): T => tf.relu(x), gelu, gelu_python: gelu },
  ...{
    gelu_new: geluTanh,
    gelu_pytorch_tanh: geluTanh,
    gelu_python_tanh: geluTanh,
    gelu_fast: geluTanh,
    gelu_accurate: geluTanh,
  },
};

/** What a config may ask for that is not done here: [field, when it is harmless, what it means]. */
const isUnset = (v: unknown) => v === undefined || v === null || v === false || v === 0;
const isUnsetOr = (neutral: unknown) => (v: unknown) => v === undefined || v === null || v === neutral;
const NOT_DONE: [field: string, harmless: (value: unknown) => boolean, meaning: string][] = [
  ['quantization_config', isUnset, 'quantised weights'],
  ['use_sliding_window', isUnset, 'sliding-window attention'],
  [
    'layer_types',
    v => isUnset(v) || (Array.isArray(v) && v.every(t => t === 'full_attention')),
    'layers without full attention',
  ],
  ['alibi', isUnset, 'ALiBi positions'],
  ['position_embedding_type', v => isUnset(v) || v === 'rope' || v === 'absolute', 'other positions'],
  ['num_local_experts', isUnset, 'a mixture of experts'],
  ['num_experts', isUnset, 'a mixture of experts'],
  ['n_routed_experts', isUnset, 'a mixture of experts'],
  ['moe_intermediate_size', isUnset, 'a mixture of experts'],
  ['attn_logit_softcapping', isUnset, 'soft-capped logits'],
  ['final_logit_softcapping', isUnset, 'soft-capped logits'],
  ['logit_softcapping', isUnset, 'soft-capped logits'],
  ['rope_interleaved', isUnset, 'interleaved rotary embedding'],
  [
    'no_rope_layers',
    v => isUnset(v) || (Array.isArray(v) && !v.includes(0)),
    'layers without rotary embedding',
  ],
  ['scale_attn_by_inverse_layer_idx', isUnset, 'attention scaled by layer'],
  ['scale_attn_weights', isUnsetOr(true), 'unscaled attention'],
  ['add_cross_attention', isUnset, 'cross-attention'],
  ['is_encoder_decoder', isUnset, 'an encoder'],
  ['clip_qkv', isUnset, 'clipped q, k, v'],
  ['logits_scaling', isUnsetOr(1), 'scaled logits'],
  ['embedding_multiplier', isUnsetOr(1), 'scaled embeddings'],
  ['residual_multiplier', isUnsetOr(1), 'scaled residuals'],
  ['attention_multiplier', isUnset, 'another attention scale'],
  ['query_pre_attn_scalar', isUnset, 'another attention scale'],
];

/** Reads a Hugging Face config. @throws UsageError naming the field that is wrong or not done here */
export function readArchitecture(config: Record<string, unknown>, file: string): Architecture {
  const refuse = (field: string, got: unknown, takes: string): never => {
    throw new UsageError(`${file}: ${field} is ${JSON.stringify(got) ?? 'missing'}; ${takes}`);
  };
  const type = String(config.model_type);
  const names = Object.hasOwn(ARCHITECTURES, type) ? ARCHITECTURES[type] : undefined;
  if (!names)
    return refuse('model_type', config.model_type, `done here are ${Object.keys(ARCHITECTURES).join(', ')}`);
  for (const [field, harmless, meaning] of NOT_DONE) {
    if (!harmless(config[field])) refuse(field, config[field], `${meaning}: not done here`);
  }
  const number = (fields: string[], fallback?: number, min = 0, max = 1e9): number => {
    const field = fields.find(f => config[f] !== undefined && config[f] !== null) ?? fields[0]!;
    const value = config[field] ?? fallback;
    return typeof value === 'number' && value >= min && value <= max
      ? value
      : refuse(field, value, `a number from ${min} to ${max}`);
  };
  const count = (fields: string[], fallback?: number, max = 1 << 24): number => {
    const value = number(fields, fallback, 1, max);
    return Number.isInteger(value) ? value : refuse(fields[0]!, value, 'an integer');
  };
  const gpt2 = type === 'gpt2';
  const neox = type === 'gpt_neox';
  const dModel = count([gpt2 ? 'n_embd' : 'hidden_size'], undefined, 1 << 17);
  const nHeads = count([gpt2 ? 'n_head' : 'num_attention_heads'], undefined, 1 << 12);
  const nKvHeads = count(['num_key_value_heads'], nHeads, 1 << 12);
  if (nHeads % nKvHeads !== 0) refuse('num_key_value_heads', nKvHeads, `a divisor of the ${nHeads} heads`);
  if (typeof config.head_dim !== 'number' && type !== 'qwen3' && dModel % nHeads !== 0)
    refuse('num_attention_heads', nHeads, `a divisor of ${dModel}`);
  const headDim = count(['head_dim'], type === 'qwen3' ? 128 : dModel / nHeads, 1 << 12);
  const activation = String(
    config[gpt2 ? 'activation_function' : 'hidden_act'] ??
      (gpt2 || type === 'llama_simple_mlp' ? 'gelu_new' : neox ? 'gelu' : 'silu'),
  );
  if (!Object.hasOwn(ACTIVATIONS, activation))
    refuse(
      gpt2 ? 'activation_function' : 'hidden_act',
      activation,
      `done here are ${Object.keys(ACTIVATIONS).join(', ')}`,
    );
  const positions = count([gpt2 ? 'n_positions' : 'max_position_embeddings'], gpt2 ? 1024 : 2048);
  // absent means 4096 in mistral; null means none
  const window =
    type === 'mistral' && config.sliding_window !== null ? count(['sliding_window'], 4096) : Infinity;
  return {
    ...{ type, dModel, nHeads, nKvHeads, headDim, names },
    vocab: count(['vocab_size']),
    dMlp: count([gpt2 ? 'n_inner' : 'intermediate_size'], gpt2 ? 4 * dModel : undefined),
    nLayers: count([gpt2 ? 'n_layer' : 'num_hidden_layers'], undefined, 4096),
    context: Math.min(positions, window),
    contextField: window < positions ? 'sliding_window' : gpt2 ? 'n_positions' : 'max_position_embeddings',
    eps: number(
      [gpt2 ? 'layer_norm_epsilon' : neox ? 'layer_norm_eps' : 'rms_norm_eps'],
      gpt2 || neox ? 1e-5 : 1e-6,
      0,
      1,
    ),
    norm: gpt2 || neox ? 'layer' : 'rms',
    ...(gpt2 ? {} : { rotary: rotaryFrequencies(config, headDim, positions, file) }),
    qkv: gpt2 ? 'concatenated' : neox ? 'per-head' : 'separate',
    activation: activation as keyof typeof ACTIVATIONS,
    parallelResidual: neox && config.use_parallel_residual !== false,
    tied: Boolean(config.tie_word_embeddings ?? (gpt2 || type === 'llama_simple_mlp')),
  };
}

/** Inverse wavelengths θ^(−2i/dims), with the `linear` and `llama3` scalings; both the old and the new config keys. */
function rotaryFrequencies(
  config: Record<string, unknown>,
  headDim: number,
  positions: number,
  file: string,
): Float32Array {
  const neox = config.model_type === 'gpt_neox';
  const rope: Record<string, unknown> = {
    rope_theta: config.rope_theta ?? config.rotary_emb_base ?? 10_000,
    partial_rotary_factor: config.rotary_pct ?? config.partial_rotary_factor ?? (neox ? 0.25 : 1),
    ...(config.rope_scaling as object | null | undefined),
    ...(config.rope_parameters as object | null | undefined),
  };
  const refuse = (field: string, takes: string): never => {
    throw new UsageError(
      `${file}: the rotary embedding's ${field} is ${JSON.stringify(rope[field]) ?? 'missing'}; ${takes}`,
    );
  };
  const number = (field: string, min: number): number => {
    const value = rope[field];
    return typeof value === 'number' && value >= min && value < 1e12
      ? value
      : refuse(field, `a number of at least ${min}`);
  };
  const kind = rope.rope_type ?? rope.type ?? 'default';
  if (kind !== 'default' && kind !== 'linear' && kind !== 'llama3')
    refuse(rope.rope_type ? 'rope_type' : 'type', 'done here are default, linear, llama3');
  const part = number('partial_rotary_factor', 0);
  if (part > 1 || (!neox && part !== 1)) refuse('partial_rotary_factor', 'partial only in gpt_neox');
  const dims = Math.floor(headDim * part);
  if (dims % 2 !== 0)
    refuse(
      'partial_rotary_factor',
      `of head_dim ${headDim} it leaves an odd number of rotated dims, ${dims}`,
    );
  const theta = number('rope_theta', 1);
  return Float32Array.from({ length: dims / 2 }, (_, i) => {
    const frequency = theta ** ((-2 * i) / dims);
    if (kind === 'default') return frequency;
    const factor = number('factor', 1);
    if (kind === 'linear') return frequency / factor;
    // llama3: long wavelengths are divided by the factor, short ones kept, a linear blend in between
    const [low, high] = [number('low_freq_factor', 0), number('high_freq_factor', 0)];
    const context =
      rope.original_max_position_embeddings === undefined
        ? positions
        : number('original_max_position_embeddings', 1);
    const keep = Math.min(1, Math.max(0, ((context * frequency) / (2 * Math.PI) - low) / (high - low)));
    return frequency * (keep + (1 - keep) / factor);
  });
}

/** A linear layer of the target's blocks: y = x Wᵀ + b. */
export interface LinearLayer {
  path: string;
  dIn: number;
  dOut: number;
}

/** The frozen network. `weights` are keyed by state-dict name; linear layers hold Wᵀ [dIn,dOut] under their path. */
export interface Target {
  readonly arch: Architecture;
  /** every linear layer of the blocks, in network order */
  readonly linears: readonly LinearLayer[];
  /** tf.Variables (not trainable), so that a traced graph keeps them as state on the device */
  readonly weights: ReadonlyMap<string, tf.Variable>;
  readonly dir: string;
  readonly sha256: string;
}

const layerName = (template: string, i: number) => template.replace('{i}', String(i));

/** The linear layers that an architecture's blocks have, in network order. */
export function linearLayers(arch: Architecture): LinearLayer[] {
  const { names, dModel, dMlp, nHeads, nKvHeads, headDim } = arch;
  const [dQ, dKv] = [nHeads * headDim, nKvHeads * headDim];
  const fused = arch.qkv !== 'separate';
  return Array.from({ length: arch.nLayers }, (_, i) => {
    const layers: [string | undefined, number, number][] = [
      [names.q, dModel, fused ? 3 * dQ : dQ],
      [names.k, dModel, dKv],
      [names.v, dModel, dKv],
      [names.o, dQ, dModel],
      [names.gate, dModel, dMlp],
      [names.up, dModel, dMlp],
      [names.down, dMlp, dModel],
    ];
    return layers.flatMap(([name, dIn, dOut]) => (name ? [{ path: layerName(name, i), dIn, dOut }] : []));
  }).flat();
}

/** Buffers that old checkpoints carry and no forward needs. */
const IGNORED_TENSORS =
  /\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias)$/;

/** Loads a Hugging Face folder. @throws UsageError naming the file and what is wrong with it */
export function loadTarget(dir: string): Target {
  const configFile = path.join(dir, 'config.json');
  const arch = readArchitecture(readJson(configFile), configFile);
  const linears = linearLayers(arch);
  const weights = new Map<string, tf.Variable>();
  const files = weightFiles(dir);
  const hash = crypto.createHash('sha256').update(fs.readFileSync(configFile));
  try {
    const where = new Map(files.flatMap(file => [...file.tensors.keys()].map(name => [name, file] as const)));
    // gpt2 is published with and without a prefix, gpt_neox with two names of its head
    const alias = (name: string) =>
      [name, `transformer.${name}`, name.replace('embed_out', 'lm_head')].find(n => where.has(n));
    const used = new Set<string>();
    const load = (
      name: string,
      shape: number[],
      options: { key?: string; transpose?: boolean } = {},
    ): void => {
      const stored = alias(name);
      if (!stored) throw new UsageError(`${dir}: no tensor ${name} in the safetensors files`);
      const file = where.get(stored)!;
      const got = file.tensors.get(stored)!.shape;
      if (got.join() !== shape.join())
        throw new UsageError(`${dir}: ${stored} has shape [${got}], config.json implies [${shape}]`);
      used.add(stored);
      const data = file.readFloat32(stored);
      hash.update(stored).update(data);
      const value = tf.tidy(() =>
        options.transpose ? tf.transpose(tf.tensor(data, shape)) : tf.tensor(data, shape),
      );
      weights.set(options.key ?? name, tf.variable(value, false));
      value.dispose();
    };
    const loadIfThere = (name: string, shape: number[]) => alias(name) !== undefined && load(name, shape);
    const loadNorm = (name: string, size: number) => {
      load(`${name}.weight`, [size]);
      if (arch.norm === 'layer') load(`${name}.bias`, [size]);
    };

    const { names, dModel, vocab, headDim } = arch;
    load(`${names.embed}.weight`, [vocab, dModel]);
    if (names.positions) load(`${names.positions}.weight`, [arch.context, dModel]);
    for (const { path: name, dIn, dOut } of linears) {
      // gpt2's Conv1D stores [dIn,dOut], every nn.Linear [dOut,dIn]; we keep Wᵀ [dIn,dOut]: no transposed product later
      const conv1d = arch.type === 'gpt2';
      load(`${name}.weight`, conv1d ? [dIn, dOut] : [dOut, dIn], { key: name, transpose: !conv1d });
      loadIfThere(`${name}.bias`, [dOut]);
    }
    for (let i = 0; i < arch.nLayers; i++) {
      loadNorm(layerName(names.norm1, i), dModel);
      loadNorm(layerName(names.norm2, i), dModel);
      for (const norm of ['q_norm', 'k_norm']) loadIfThere(headNorm(arch, i, norm), [headDim]);
    }
    loadNorm(names.finalNorm, dModel);
    if (alias(`${names.head}.weight`)) load(`${names.head}.weight`, [vocab, dModel]);
    else if (!arch.tied)
      throw new UsageError(`${dir}: ${names.head}.weight is missing and tie_word_embeddings is false`);
    const leftOver = [...where.keys()].filter(name => !used.has(name) && !IGNORED_TENSORS.test(name));
    if (leftOver.length > 0)
      throw new UsageError(
        `${dir}: tensors that ${arch.type} does not use: ${leftOver.slice(0, 5).join(', ')}`,
      );
  } finally {
    for (const file of files) file.close();
  }
  return { arch, linears, weights, dir, sha256: hash.digest('hex') };
}

const headNorm = (arch: Architecture, i: number, norm: string) =>
  `${layerName(arch.names.q, i).replace(/[^.]*$/, norm)}.weight`;

/** model.safetensors, or the shards that model.safetensors.index.json names, or the one model_step_<n>.safetensors. */
function weightFiles(dir: string): SafetensorsFile[] {
  const indexFile = path.join(dir, 'model.safetensors.index.json');
  let names: string[] = fs.readdirSync(dir).filter(f => f === 'model.safetensors');
  if (names.length === 0 && fs.existsSync(indexFile)) {
    const map = readJson(indexFile).weight_map;
    if (typeof map !== 'object' || map === null) throw new UsageError(`${indexFile}: no weight_map`);
    names = [...new Set(Object.values(map).map(String))];
    for (const name of names) {
      if (!/^[\w.-]+\.safetensors$/.test(name))
        throw new UsageError(
          `${indexFile}: ${JSON.stringify(name)} is not the name of a shard in this folder`,
        );
    }
  }
  if (names.length === 0) names = fs.readdirSync(dir).filter(f => /^model_step_\d+\.safetensors$/.test(f));
  if (names.length === 0)
    throw new UsageError(`${dir}: no model.safetensors, no model.safetensors.index.json`);
  if (names.length > 1 && names.every(n => n.startsWith('model_step_')))
    throw new UsageError(`${dir}: several checkpoints (${names.join(', ')}); leave one`);
  return names.map(name => openSafetensors(path.join(dir, name)));
}

function readJson(file: string): Record<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(fs.readFileSync(file, 'utf8'));
  } catch (error) {
    throw new UsageError(`${file}: ${(error as Error).message}`);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw new UsageError(`${file}: not a JSON object`);
  return value as Record<string, unknown>;
}

/** How a linear layer is computed: the target's own, or one of the masked forwards of section E. */
export type Linear = (path: string, x: T<'N dIn'>) => T<'N dOut'>;

function weight(target: Target, name: string): tf.Variable {
  const variable = target.weights.get(name);
  if (!variable) throw new Error(`no weight ${name}`);
  return variable;
}

/** x Wᵀ, and + b where there is one. */
const product = (target: Target, name: string, x: T<'N dIn'>): T<'N dOut'> =>
  tf.matMul(x as tf.Tensor2D, weight(target, name) as unknown as tf.Tensor2D);
const addBias = (target: Target, name: string, y: T<'N dOut'>): T<'N dOut'> => {
  const bias = target.weights.get(`${name}.bias`);
  return bias ? tf.add(y, bias) : y;
};
export const ownLinear =
  (target: Target): Linear =>
  (name, x) =>
    addBias(target, name, product(target, name, x));

/** x / rms(x) over the last axis. */
export const rmsNormalize = <A extends string>(x: T<A>, eps: number): T<A> =>
  tf.mul(x, tf.rsqrt(tf.add(tf.mean(tf.square(x), -1, true), eps)));

function norm(target: Target, name: string, x: T<'N d'>): T<'N d'> {
  const { arch } = target;
  if (arch.norm === 'rms') return tf.mul(rmsNormalize(x, arch.eps), weight(target, `${name}.weight`));
  const centred = tf.sub(x, tf.mean(x, -1, true));
  return tf.add(
    tf.mul(rmsNormalize(centred, arch.eps), weight(target, `${name}.weight`)),
    weight(target, `${name}.bias`),
  );
}

/** Half-split rotary embedding of the first 2·len(frequencies) dims of every head. x [B,H,S,hd] */
export function rotate(x: T<'B H S hd'>, frequencies: Float32Array): T<'B H S hd'> {
  const [S = 0, headDim = 0] = x.shape.slice(2);
  const half = frequencies.length;
  const angle = tf.mul(tf.range(0, S, 1, 'float32').reshape([S, 1]), tf.tensor2d(frequencies, [1, half])); // [S,hd/2]
  const [cos, sin] = [tf.cos(angle), tf.sin(angle)];
  const rest = headDim - 2 * half;
  const [a, b, ...untouched] = tf.split(x, rest > 0 ? [half, half, rest] : [half, half], 3) as [
    tf.Tensor,
    tf.Tensor,
    ...tf.Tensor[],
  ];
  return tf.concat(
    [tf.sub(tf.mul(a, cos), tf.mul(b, sin)), tf.add(tf.mul(b, cos), tf.mul(a, sin)), ...untouched],
    3,
  );
}

/** softmax(q kᵀ / √hd) v; with fewer k, v heads than q heads each of them serves a group. q [B,H,S,hd], k, v [B,H',S,hd] */
function attend(q: T<'B H S hd'>, k: T<'B H S hd'>, v: T<'B H S hd'>, causal: boolean): T<'N d'> {
  const [B = 0, H = 0, S = 0, headDim = 0] = q.shape;
  const kvHeads = k.shape[1]!;
  const grouped = q.reshape([B, kvHeads, (H / kvHeads) * S, headDim]); // the heads of a group, one below the other
  let scores: tf.Tensor = tf
    .mul(tf.matMul(grouped, k, false, true), 1 / Math.sqrt(headDim))
    .reshape([B, H, S, S]);
  if (causal) {
    const position = tf.range(0, S, 1, 'float32');
    scores = tf.add(
      scores,
      tf.mul(-1e9, tf.cast(tf.greater(position.reshape([1, S]), position.reshape([S, 1])), 'float32')),
    );
  }
  const mixed = tf.matMul(
    tf.softmax(scores).reshape(grouped.shape.with(3, S) as [number, number, number, number]),
    v,
  );
  return mixed
    .reshape([B, H, S, headDim])
    .transpose([0, 2, 1, 3])
    .reshape([B * S, H * headDim]);
}

/** [N, H·hd] -> [B,H,S,hd] */
const toHeads = (x: T<'N d'>, B: number, S: number, H: number): T<'B H S hd'> =>
  x.reshape([B, S, H, x.shape[1]! / H]).transpose([0, 2, 1, 3]);

function targetAttention(
  target: Target,
  i: number,
  h: T<'N d'>,
  B: number,
  S: number,
  linear: Linear,
): T<'N d'> {
  const { arch } = target;
  const { names, nHeads, nKvHeads } = arch;
  let [q, k, v] = [] as unknown as [T, T, T];
  if (arch.qkv === 'separate') {
    q = toHeads(linear(layerName(names.q, i), h), B, S, nHeads);
    k = toHeads(linear(layerName(names.k!, i), h), B, S, nKvHeads);
    v = toHeads(linear(layerName(names.v!, i), h), B, S, nKvHeads);
  } else {
    const qkv = linear(layerName(names.q, i), h); // columns: all of q | all of k | all of v, or q, k, v head by head
    const parts =
      arch.qkv === 'concatenated' ? tf.split(qkv, 3, 1) : tf.split(qkv.reshape([B * S, nHeads, -1]), 3, 2);
    [q, k, v] = parts.map(part => toHeads(part.reshape([B * S, -1]), B, S, nHeads)) as [T, T, T];
  }
  const headNorms = [headNorm(arch, i, 'q_norm'), headNorm(arch, i, 'k_norm')].map(name =>
    target.weights.get(name),
  );
  if (headNorms[0]) q = tf.mul(rmsNormalize(q, arch.eps), headNorms[0]);
  if (headNorms[1]) k = tf.mul(rmsNormalize(k, arch.eps), headNorms[1]);
  if (arch.rotary) [q, k] = [rotate(q, arch.rotary), rotate(k, arch.rotary)];
  return linear(layerName(names.o, i), attend(q, k, v, true));
}

function targetMlp(target: Target, i: number, h: T<'N d'>, linear: Linear): T<'N d'> {
  const { names, activation } = target.arch;
  const act = ACTIVATIONS[activation];
  const up = linear(layerName(names.up, i), h);
  const hidden = names.gate ? tf.mul(act(linear(layerName(names.gate, i), h)), up) : act(up);
  return linear(layerName(names.down, i), hidden);
}

/**
 * The target's logits, every linear layer of its blocks computed by `linear` (default: its own).
 * @param tokens int32 [B,S]
 * @returns logits [N, vocab], N = B·S
 */
export function targetForward(target: Target, tokens: T<'B S'>, linear = ownLinear(target)): T<'N vocab'> {
  const { arch } = target;
  const { names } = arch;
  const [B = 0, S = 0] = tokens.shape;
  let x: T<'N d'> = tf.gather(weight(target, `${names.embed}.weight`), tokens.flatten());
  if (names.positions) {
    const positions = tf.slice(weight(target, `${names.positions}.weight`), [0, 0], [S, arch.dModel]);
    x = tf.add(x.reshape([B, S, arch.dModel]), positions).reshape([B * S, arch.dModel]);
  }
  for (let i = 0; i < arch.nLayers; i++) {
    const attention = targetAttention(target, i, norm(target, layerName(names.norm1, i), x), B, S, linear);
    if (arch.parallelResidual) {
      x = tf.add(
        tf.add(x, attention),
        targetMlp(target, i, norm(target, layerName(names.norm2, i), x), linear),
      );
    } else {
      x = tf.add(x, attention);
      x = tf.add(x, targetMlp(target, i, norm(target, layerName(names.norm2, i), x), linear));
    }
  }
  const head = target.weights.get(`${names.head}.weight`) ?? weight(target, `${names.embed}.weight`);
  return tf.matMul(
    norm(target, names.finalNorm, x) as tf.Tensor2D,
    head as unknown as tf.Tensor2D,
    false,
    true,
  );
}

// ---- D. Data --------------------------------------------------------------------------------------------------------

/** Rows of tokens, all of the same length. */
export interface Rows {
  readonly count: number;
  readonly seqLen: number;
  row(i: number): Int32Array;
}

export function loadTokenizer(dir: string): Tokenizer {
  const file = path.join(dir, 'tokenizer.json');
  const configFile = path.join(dir, 'tokenizer_config.json');
  const json = readJson(file);
  const config = fs.existsSync(configFile) ? readJson(configFile) : {};
  try {
    return new Tokenizer(json, config);
  } catch (error) {
    throw new UsageError(`${file}: not a tokenizer that can be read (${(error as Error).message})`);
  }
}

/**
 * The ids of one document. A tokenizer that adds begin-of-text (or end-of-text) by itself marks the border between
 * documents with it; to any other one we add the model's end-of-text id, as in training on packed text.
 */
export function documentIds(tokenizer: Tokenizer, text: string, endOfText: number | undefined): number[] {
  const plain = tokenizer.encode(text, { add_special_tokens: false }).ids;
  const marked = tokenizer.encode(text).ids;
  if (marked.length > plain.length || endOfText === undefined) return marked;
  return [...plain, endOfText];
}

/** Documents of a .txt (a line each, or blank-line separated) or .jsonl file: texts, or ids where the file has ids. */
export function* readDocuments(file: string): Generator<string | number[]> {
  const content = fs.readFileSync(file, 'utf8');
  if (!file.endsWith('.jsonl')) {
    const separator = /\n\s*\n/.test(content.trim()) ? /\n\s*\n/ : /\n/;
    for (const document of content.split(separator)) if (document.trim()) yield document.trim();
    return;
  }
  for (const [i, line] of content.split('\n').entries()) {
    if (!line.trim()) continue;
    let record: { text?: unknown; input_ids?: unknown };
    try {
      record = JSON.parse(line);
    } catch (error) {
      throw new UsageError(`${file}:${i + 1}: ${(error as Error).message}`);
    }
    const content = record?.text ?? record?.input_ids;
    if (typeof content !== 'string' && !Array.isArray(content))
      throw new UsageError(`${file}:${i + 1}: takes {"text": …} or {"input_ids": […]}`);
    yield content;
  }
}

/** Token ids read from a file must be ids of this model. */
function checkIds(ids: readonly unknown[], vocab: number, where: string): number[] {
  const wrong = ids.find(id => !Number.isInteger(id) || (id as number) < 0 || (id as number) >= vocab);
  if (wrong !== undefined)
    throw new UsageError(
      `${where}: ${JSON.stringify(wrong)} is not a token id of the model (0 to ${vocab - 1})`,
    );
  return ids as number[];
}

/** All documents of a file as ids, and the row length that it implies: a .json file holds rows, used as they are. */
function loadDocuments(
  file: string,
  target: Target,
  tokenizer: Tokenizer | undefined,
  seqLen: number,
): { documents: number[][]; seqLen: number } {
  const { vocab } = target.arch;
  if (!fs.existsSync(file)) throw new UsageError(`${file}: no such file`);
  if (file.endsWith('.json')) {
    let rows: unknown;
    try {
      rows = JSON.parse(fs.readFileSync(file, 'utf8'));
    } catch (error) {
      throw new UsageError(`${file}: ${(error as Error).message}`);
    }
    if (!Array.isArray(rows) || rows.length === 0 || !rows.every(Array.isArray))
      throw new UsageError(`${file}: takes [[ids…], …]`);
    const length = rows[0].length;
    const odd = rows.findIndex(row => row.length !== length || length < 2);
    if (odd >= 0)
      throw new UsageError(
        `${file}: row ${odd} has ${rows[odd].length} tokens; takes rows of equal length, at least 2`,
      );
    return { documents: rows.map(row => checkIds(row, vocab, file)), seqLen: length };
  }
  if (!/\.(txt|jsonl)$/.test(file)) throw new UsageError(`${file}: takes .txt, .jsonl or .json`);
  const endOfText = endOfTextId(target.dir);
  const documents: number[][] = [];
  for (const document of readDocuments(file)) {
    if (typeof document === 'string' && !tokenizer) {
      throw new UsageError(
        `${target.dir}: no tokenizer.json, so data must be ids: .json rows or {"input_ids": […]} lines`,
      );
    }
    const ids = typeof document === 'string' ? documentIds(tokenizer!, document, endOfText) : document;
    documents.push(checkIds(ids, vocab, file));
  }
  return { documents, seqLen };
}

/** The model's end-of-text id, from config.json (a list in some Llamas: the first). */
function endOfTextId(dir: string): number | undefined {
  const id = [readJson(path.join(dir, 'config.json')).eos_token_id].flat()[0];
  return Number.isInteger(id) ? (id as number) : undefined;
}

/** Documents joined and cut into rows; an incomplete last row is left out. */
function pack(documents: number[][], seqLen: number): Rows {
  const tokens = new Int32Array(documents.reduce((n, d) => n + d.length, 0));
  let end = 0;
  for (const document of documents) {
    tokens.set(document, end);
    end += document.length;
  }
  return { count: Math.floor(end / seqLen), seqLen, row: i => tokens.subarray(i * seqLen, (i + 1) * seqLen) };
}

export interface Data {
  train: Rows;
  heldOut: Rows;
  tokenizer: Tokenizer | undefined;
}

/** Training rows, and the held-out ones: those of `evalData`, else of the last 5 % of the documents. */
export function loadData(target: Target, config: Config): Data {
  const tokenizer = fs.existsSync(path.join(target.dir, 'tokenizer.json'))
    ? loadTokenizer(target.dir)
    : undefined;
  const load = (file: string) => loadDocuments(file, target, tokenizer, config.seqLen);
  let { documents, seqLen } = load(config.data);
  let heldOut: Rows;
  if (config.evalData) {
    const held = load(config.evalData);
    heldOut = pack(held.documents, held.seqLen);
  } else {
    // one long text has no last 5 % of documents: then of its rows
    if (documents.length < 20)
      documents = Array.from(documents, d => pack([d], seqLen)).flatMap(r =>
        Array.from({ length: r.count }, (_, i) => [...r.row(i)]),
      );
    const kept = Math.ceil(documents.length * 0.05);
    heldOut = pack(documents.splice(documents.length - kept), seqLen);
  }
  const train = pack(documents, seqLen);
  const { context, contextField } = target.arch;
  for (const [what, rows] of [
    ['--data', train],
    ['held-out data', heldOut],
  ] as const) {
    if (rows.count < 1)
      throw new UsageError(`${what}: too short for one row of ${rows.seqLen} tokens (--seq-len)`);
    if (rows.seqLen > context)
      throw new UsageError(
        `${what}: rows of ${rows.seqLen} tokens, but the target's ${contextField} is ${context} (--seq-len)`,
      );
  }
  return { train, heldOut, tokenizer };
}

/** Rows `indices` as an int32 tensor [B,S]. */
export function tokenBatch(rows: Rows, indices: readonly number[]): tf.Tensor2D {
  const tokens = new Int32Array(indices.length * rows.seqLen);
  for (const [i, index] of indices.entries()) tokens.set(rows.row(index), i * rows.seqLen);
  return tf.tensor2d(tokens, [indices.length, rows.seqLen], 'int32');
}

/** The row indices of one training step: every epoch is a new shuffle, a function of (seed, epoch) alone. */
export function batchIndices(count: number, batchSize: number, step: number, seed: number): number[] {
  return Array.from({ length: batchSize }, (_, i) => {
    const position = step * batchSize + i;
    return shuffled(count, seed, Math.floor(position / count))[position % count]!;
  });
}
let lastShuffle: { key: string; order: Uint32Array } | undefined;
function shuffled(count: number, seed: number, epoch: number): Uint32Array {
  const key = `${count},${seed},${epoch}`;
  if (lastShuffle?.key !== key) {
    const order = Uint32Array.from({ length: count }, (_, i) => i);
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
  const rules =
    spec === 'auto'
      ? undefined
      : spec.split(',').map(rule => {
          const [, pattern = '', C = ''] = /^([^=]+)=(\d+)$/.exec(rule.trim()) ?? [];
          if (!pattern || Number(C) < 1)
            throw new UsageError(
              `--components: ${JSON.stringify(rule)} is not pattern=C, as in "*.q_proj=64"`,
            );
          const regex = new RegExp(
            `^${pattern
              .split('*')
              .map(s => s.replace(/[.+?^${}()|[\]\\]/g, '\\$&'))
              .join('.*')}$`,
          );
          if (!linears.some(l => regex.test(l.path))) {
            throw new UsageError(
              `--components: ${pattern} matches no linear layer; there are ${linears.map(l => l.path).join(', ')}`,
            );
          }
          return { regex, C: Number(C) };
        });
  const modules: Module[] = [];
  let offset = 0;
  for (const layer of [...linears].sort((a, b) => (a.path < b.path ? -1 : 1))) {
    const C = rules ? rules.find(r => r.regex.test(layer.path))?.C : Math.max(layer.dIn, layer.dOut);
    if (C === undefined) continue;
    modules.push({ ...layer, C, offset });
    offset += C;
  }
  return modules;
}

/** Parameters by their names in components.safetensors: `components.<path>.V`, `.U` and `ci_fn.*`. */
export type Params = Record<string, tf.Variable>;
const V = (params: Tensors, { path }: Module) => params[`components.${path}.V`] as tf.Tensor2D; // [dIn,C]
const U = (params: Tensors, { path }: Module) => params[`components.${path}.U`] as tf.Tensor2D; // [C,dOut]

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
export function maskedLinear(
  { target, modules }: Problem,
  params: Tensors,
  { mask, delta, route }: Masks,
): Linear {
  const index = new Map(modules.map((m, i) => [m.path, i]));
  const columns = (x: T<'N M'>) => tf.split(x, modules.length, 1);
  const masks = tf.split(
    mask,
    modules.map(m => m.C),
    1,
  );
  const [deltas, routes] = [delta && columns(delta), route && columns(route)];
  const own = ownLinear(target);
  return (name, x) => {
    const i = index.get(name);
    if (i === undefined) return own(name, x);
    const [m, δ, r] = [masks[i]!, deltas?.[i], routes?.[i]];
    let a: T<'N C'> = δ ? tf.sub(m, δ) : m;
    if (r) a = tf.mul(r, a);
    const inner = tf.mul(tf.matMul(x as tf.Tensor2D, V(params, modules[i]!)), a);
    const y = tf.matMul(inner as tf.Tensor2D, U(params, modules[i]!));
    if (!δ && !r) return addBias(target, name, y); // s = 0
    const s = r ? tf.sub(1, tf.mul(r, tf.sub(1, δ ?? 0))) : δ!;
    return addBias(target, name, tf.add(y, tf.mul(s, product(target, name, x))));
  };
}

/** The target's own forward, with what everything else is measured against. */
export interface TargetPass {
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
  return { acts, outputs, logProbs, probs: tf.exp(logProbs) };
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
export const ciInput = ({ modules }: Problem, { acts }: TargetPass): T<'N ΣdIn'> =>
  tf.concat(
    modules.map(m => rmsNormalize(acts[m.path]!, FLOAT32_EPSILON)),
    1,
  );

/** Logits z [N, ΣC] of causal importance. */
export function ciLogits({ config }: Problem, params: Tensors, input: T<'N ΣdIn'>, S: number): T<'N ΣC'> {
  const linear = (name: string, x: tf.Tensor): tf.Tensor => {
    const y = tf.matMul(x as tf.Tensor2D, params[`ci_fn.${name}.weight`] as tf.Tensor2D, false, true);
    const bias = params[`ci_fn.${name}.bias`];
    return bias ? tf.add(y, bias) : y;
  };
  const B = input.shape[0]! / S;
  const headDim = config.ciDModel / config.ciNHeads;
  const frequencies = Float32Array.from(
    { length: headDim / 2 },
    (_, i) => config.ciRopeBase ** ((-2 * i) / headDim),
  );
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

const indicator = (condition: tf.Tensor): tf.Tensor => tf.cast(condition, 'float32');

/**
 * The lower-leaky hard sigmoid g = clamp(z, 0, 1), which builds masks (method 2). Its gradient is made by hand: the
 * upstream gradient where 0 < z ≤ 1; α times it where z ≤ 0 and it would push z up, so that a dead component can be
 * revived and is never pushed deeper; 0 elsewhere.
 */
export const lowerLeaky = (z: T<'N ΣC'>, alpha: number): T<'N ΣC'> =>
  tf.customGrad((x, save) => {
    (save as tf.GradSaveFunc)([x as tf.Tensor]);
    return {
      value: tf.clipByValue(x as tf.Tensor, 0, 1),
      gradFunc: (dy: tf.Tensor, [saved]: tf.Tensor[]) => {
        const inside = indicator(tf.logicalAnd(tf.greater(saved!, 0), tf.lessEqual(saved!, 1)));
        const below = tf.mul(alpha, indicator(tf.lessEqual(saved!, 0)));
        return tf.add(tf.mul(dy, inside), tf.mul(tf.minimum(dy, 0), below));
      },
    };
  })(z);

/** The upper-leaky hard sigmoid g⁺: clamp(z, 0, 1) up to 1 and 1 + α (z − 1) above; enters the importance loss. */
export const upperLeaky = (z: T<'N ΣC'>, alpha: number): T<'N ΣC'> =>
  tf.add(tf.clipByValue(z, 0, 1), tf.mul(alpha, tf.relu(tf.sub(z, 1))));

// ---- G. Losses (method 3) -------------------------------------------------------------------------------------------

/** Σ ‖Δ‖² / Σ numel(Δ) over all modules: with everything on, the parts must add up to the target. */
export function faithfulnessLoss({ target, modules }: Problem, params: Tensors): tf.Scalar {
  const squares = modules.map(m =>
    tf.sum(tf.square(tf.sub(weight(target, m.path), tf.matMul(V(params, m), U(params, m))))),
  );
  const numel = modules.reduce((n, m) => n + m.dIn * m.dOut, 0);
  return tf.div(tf.addN(squares), numel);
}

/**
 * Σ_c [ μ_c + β μ_c log2(1 + R σ_c) ],  σ_c = Σ over positions of (g⁺ + ε)^p,  μ_c = σ_c / N: few components at each
 * position (p < 1 prefers exact zeros), and above that rarely used ones. R: equal shards that the batch was split into.
 */
export function importanceLoss(
  gUpper: T<'N ΣC'>,
  p: tf.Tensor,
  config: Pick<Config, 'impEps' | 'impBeta' | 'microBatches'>,
): tf.Scalar {
  // ε: the slope of g^p at 0 is infinite when p < 1
  const sigma = tf.sum(tf.pow(tf.add(gUpper, config.impEps), p), 0);
  const mu = tf.div(sigma, gUpper.shape[0]!);
  const log2 = tf.mul(tf.log(tf.add(1, tf.mul(config.microBatches, sigma))), Math.LOG2E);
  return tf.sum(tf.mul(mu, tf.add(1, tf.mul(config.impBeta, log2))));
}

/** Mean over positions of KL(target ‖ prediction), in nats. */
export function klLoss({ probs, logProbs }: TargetPass, logits: T<'N vocab'>): tf.Scalar {
  return tf.div(tf.sum(tf.mul(probs, tf.sub(logProbs, tf.logSoftmax(logits)))), logits.shape[0]!);
}

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

/** Random masks of the stochastic reconstruction loss for one batch. */
export function stochasticDraws(
  { modules }: Problem,
  N: number,
  key: tf.Tensor,
): { u: T<'N ΣC'>; delta: T<'N M'>; route: T<'N M'> } {
  const M = modules.length;
  return {
    u: uniform([N, totalC(modules)], key, PURPOSE.stochMask),
    delta: uniform([N, M], key, PURPOSE.stochDelta),
    route: randomRouting(uniform([N, M], key, PURPOSE.route), uniform([N, 1], key, PURPOSE.routeCount)),
  };
}

/** KL with random masks, a random part of the modules routed through their components. */
export function stochasticLoss(
  problem: Problem,
  params: Tensors,
  tokens: T<'B S'>,
  pass: TargetPass,
  g: T<'N ΣC'>,
  draws: ReturnType<typeof stochasticDraws>,
): tf.Scalar {
  const masks = { mask: interpolate(g, draws.u), delta: draws.delta, route: draws.route };
  return klLoss(pass, targetForward(problem.target, tokens, maskedLinear(problem, params, masks)));
}

/** KL with the adversary's masks: sources [N, ΣC + M], the last M columns are the delta masks. No routing. */
export function adversarialLoss(
  problem: Problem,
  params: Tensors,
  tokens: T<'B S'>,
  pass: TargetPass,
  g: T<'N ΣC'>,
  sources: T<'N ΣC+M'>,
): tf.Scalar {
  const [s, delta] = tf.split(sources, [totalC(problem.modules), problem.modules.length], 1) as [
    tf.Tensor,
    tf.Tensor,
  ];
  return klLoss(
    pass,
    targetForward(problem.target, tokens, maskedLinear(problem, params, { mask: interpolate(g, s), delta })),
  );
}

// ---- H. Persistent PGD (method 4) -----------------------------------------------------------------------------------
// The adversary's sources persist from step to step, so it finds in thousands of steps what a fresh one would in many
// steps each time.

/** One Adam step's direction m̂ / (√v̂ + ε) with the new moments. c1, c2 = 1 − β1ᵗ, 1 − β2ᵗ undo the moments' start at 0. */
export function adam(
  grad: T,
  m: T,
  v: T,
  betas: { beta1: number; beta2: number; eps: number },
  c1: tf.Tensor,
  c2: tf.Tensor,
) {
  const { beta1, beta2, eps } = betas;
  const newM = tf.add(tf.mul(m, beta1), tf.mul(grad, 1 - beta1));
  const newV = tf.add(tf.mul(v, beta2), tf.mul(tf.square(grad), 1 - beta2));
  const direction = tf.div(tf.div(newM, c1), tf.add(tf.sqrt(tf.div(newV, c2)), eps));
  return { direction, m: newM, v: newV };
}

/** The sources of one shard of the batch with the moments of their Adam; sources [N, ΣC + M] in [0, 1]. */
export interface Sources {
  s: tf.Tensor;
  m: tf.Tensor;
  v: tf.Tensor;
}

/** One ascent step of the adversary, clamped to [0, 1]. */
export function ascend(
  { s, m, v }: Sources,
  grad: T,
  config: Config,
  lr: tf.Tensor,
  c1: tf.Tensor,
  c2: tf.Tensor,
): Sources {
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
  /** Adam's moments, under the names of the parameters */
  m: Params;
  v: Params;
  /** [batchSize·S, ΣC + M] each */
  sources: { s: tf.Variable; m: tf.Variable; v: tf.Variable };
  /** gradients summed over the shards of a batch; empty when there is one */
  summed: Params;
}

/** The feeds of one step (or of one shard of it). */
export type StepFeeds = {
  tokens: tf.Tensor; // int32 [B,S]
  key: tf.Tensor; // int32 [2]
  lrMain: tf.Tensor;
  lrPpgd: tf.Tensor;
  p: tf.Tensor;
  c1: tf.Tensor;
  c2: tf.Tensor;
  ppgdC1: tf.Tensor; // [inner + 1]
  ppgdC2: tf.Tensor;
};

const LOSSES = ['faith', 'imp', 'stoch', 'ppgd'] as const;
const isComponent = (name: string) => name.startsWith('components.');

/**
 * Losses and gradients of one batch (or shard), and the adversary's moves: `ppgdInnerSteps` before, one after.
 * @returns losses [4] in the order of LOSSES, gradients by parameter name, the sources afterwards, L0 (mean number of
 *   components with g > ciAliveThreshold)
 */
export function lossesAndGradients(problem: Problem, params: Tensors, before: Sources, feeds: StepFeeds) {
  const { config } = problem;
  const { tokens, key, lrPpgd } = feeds;
  const [B = 0, S = 0] = tokens.shape;
  const pass = targetPass(problem.target, tokens);
  const input = ciInput(problem, pass);
  // z is a leaf below: what it costs is differentiated first, then the CI function once, with dz as upstream gradient
  const z = ciLogits(problem, params, input, S);
  const g = lowerLeaky(z, config.leakyAlpha);
  const draws = stochasticDraws(problem, B * S, key);
  const [c1, c2] = [tf.unstack(feeds.ppgdC1), tf.unstack(feeds.ppgdC2)];

  let sources = before;
  if (config.coeffPpgd > 0) {
    for (let k = 0; k < config.ppgdInnerSteps; k++) {
      const [grad] = tf.grads(s => adversarialLoss(problem, params, tokens, pass, g, s))([sources.s]);
      sources = ascend(sources, grad!, config, lrPpgd, c1[k]!, c2[k]!);
    }
  }

  const losses = () => {
    const gLower = lowerLeaky(z, config.leakyAlpha);
    return tf.stack([
      faithfulnessLoss(problem, params),
      importanceLoss(upperLeaky(z, config.leakyAlpha), feeds.p, config),
      stochasticLoss(problem, params, tokens, pass, gLower, draws),
      adversarialLoss(problem, params, tokens, pass, gLower, sources.s),
    ]);
  };
  const names = Object.keys(params).filter(isComponent);
  // total = Σ coefficient × loss, so the coefficients are the upstream gradient of the vector of losses
  const coefficients = tf.tensor1d([config.coeffFaith, config.coeffImp, config.coeffStoch, config.coeffPpgd]);
  const { value, grads } = tf.valueAndGrads(losses)(
    [...names.map(n => params[n]!), z, sources.s],
    coefficients,
  );
  const [dz, dSources] = grads.splice(names.length) as [tf.Tensor, tf.Tensor];
  const gradients: Tensors = Object.fromEntries(names.map((n, i) => [n, grads[i]!]));
  const ciNames = Object.keys(params).filter(n => !isComponent(n));
  const ciGradients = tf.grads(() => ciLogits(problem, params, input, S))(
    ciNames.map(n => params[n]!),
    dz,
  );
  for (const [i, n] of ciNames.entries()) gradients[n] = ciGradients[i]!;

  if (config.coeffPpgd > 0) {
    // the adversary's third move needs no backward pass of its own: its gradient is in the total's
    const k = config.ppgdInnerSteps;
    sources = ascend(sources, tf.div(dSources, config.coeffPpgd), config, lrPpgd, c1[k]!, c2[k]!);
  }
  const l0 = tf.div(tf.sum(indicator(tf.greater(g, config.ciAliveThreshold))), B * S);
  return { losses: value, gradients, sources, l0 };
}

/** √Σ‖grad‖² over the given gradients. */
const globalNorm = (grads: tf.Tensor[]): tf.Tensor =>
  tf.sqrt(tf.addN(grads.map(grad => tf.sum(tf.square(grad)))));

/** min(1, limit / norm), with the 1e-6 of torch.nn.utils.clip_grad_norm_; limit 0 = off. */
const clipFactor = (norm: tf.Tensor, limit: number): tf.Tensor =>
  limit > 0 ? tf.minimum(1, tf.div(limit, tf.add(norm, 1e-6))) : tf.onesLike(norm);

/** AdamW with weight decay 0: moves the named parameters and their moments. */
function adamUpdate(
  state: State,
  gradients: Tensors,
  { lrMain, c1, c2 }: Pick<StepFeeds, 'lrMain' | 'c1' | 'c2'>,
): void {
  for (const [name, grad] of Object.entries(gradients)) {
    const [param, m, v] = [state.params[name]!, state.m[name]!, state.v[name]!];
    const step = adam(grad, m, v, MAIN_BETAS, c1, c2);
    param.assign(tf.sub(param, tf.mul(lrMain, step.direction)));
    m.assign(step.m);
    v.assign(step.v);
  }
}

/** Clips the gradients and moves every parameter. @returns the norms before clipping */
export function applyGradients(
  { config }: Problem,
  state: State,
  gradients: Tensors,
  feeds: Pick<StepFeeds, 'lrMain' | 'c1' | 'c2'>,
) {
  const all = Object.entries(gradients);
  const norms = {
    components: globalNorm(all.filter(([n]) => isComponent(n)).map(([, grad]) => grad)),
    ci: globalNorm(all.filter(([n]) => !isComponent(n)).map(([, grad]) => grad)),
  };
  const clip = {
    components: clipFactor(norms.components, config.gradClipComponents),
    ci: clipFactor(norms.ci, config.gradClipCi),
  };
  // a gradient that is not finite moves nothing, so that the parameters can still be looked at when the run stops
  const finite = tf.isFinite(tf.add(norms.components, norms.ci));
  const clipped = all.map(([name, grad]) => {
    const scaled = tf.mul(grad, isComponent(name) ? clip.components : clip.ci);
    return [name, tf.where(finite, scaled, tf.zerosLike(scaled))] as const;
  });
  const lrMain = tf.where(finite, feeds.lrMain, tf.scalar(0));
  adamUpdate(state, Object.fromEntries(clipped), { ...feeds, lrMain });
  return norms;
}

/** Metrics of a training step, in the order in which the compiled step returns them. */
const STEP_METRICS = [
  ...LOSSES.map(l => `loss/${l}`),
  'loss/total',
  'train/l0',
  'grad_norm/components',
  'grad_norm/ci',
];

function stepMetrics(
  config: Config,
  losses: tf.Tensor,
  l0: tf.Tensor,
  norms: { components: tf.Tensor; ci: tf.Tensor },
): tf.Tensor {
  const coefficients = tf.tensor1d([config.coeffFaith, config.coeffImp, config.coeffStoch, config.coeffPpgd]);
  const total = tf.sum(tf.mul(losses, coefficients));
  return tf.concat([losses, tf.stack([total, l0, norms.components, norms.ci])]);
}

/** One training step as a compiled function: feeds in, the state moved on, STEP_METRICS out. */
function compileStep(
  engine: Engine,
  problem: Problem,
  state: State,
): (step: number, data: Rows) => Promise<Float32Array> {
  const { config } = problem;
  const { s, m, v } = state.sources;
  const R = config.microBatches;
  const n = s.shape[0]! / R; // positions of a shard

  const whole = engine.compile('step', (feeds: StepFeeds) => {
    const { losses, gradients, sources, l0 } = lossesAndGradients(problem, state.params, { s, m, v }, feeds);
    s.assign(sources.s);
    m.assign(sources.m);
    v.assign(sources.v);
    return { metrics: stepMetrics(config, losses, l0, applyGradients(problem, state, gradients, feeds)) };
  });

  // With microBatches > 1 the batch comes in R shards that each keep their own sources; gradients are averaged.
  const shard = engine.compile('shard', ({ index, ...feeds }: StepFeeds & { index: tf.Tensor }) => {
    const rows = tf.cast(
      tf.add(tf.range(0, n, 1, 'int32'), tf.mul(index, tf.scalar(n, 'int32'))),
      'int32',
    ) as tf.Tensor1D;
    const mine = { s: tf.gather(s, rows), m: tf.gather(m, rows), v: tf.gather(v, rows) };
    const { losses, gradients, sources, l0 } = lossesAndGradients(problem, state.params, mine, feeds);
    for (const [all, part] of [
      [s, sources.s],
      [m, sources.m],
      [v, sources.v],
    ] as const) {
      all.assign(tf.tensorScatterUpdate(all, rows.expandDims(1), part));
    }
    for (const [name, grad] of Object.entries(gradients))
      state.summed[name]!.assign(tf.add(state.summed[name]!, tf.div(grad, R)));
    return { losses, l0 };
  });
  const update = engine.compile(
    'update',
    ({
      losses,
      l0,
      ...feeds
    }: Pick<StepFeeds, 'lrMain' | 'c1' | 'c2'> & { losses: tf.Tensor; l0: tf.Tensor }) => {
      const norms = applyGradients(problem, state, state.summed, feeds);
      for (const sum of Object.values(state.summed)) sum.assign(tf.zerosLike(sum));
      return { metrics: stepMetrics(config, losses, l0, norms) };
    },
  );

  return async (step, data) => {
    const { ppgdC1, ppgdC2, ...scalars } = schedule(config, step);
    const indices = batchIndices(data.count, config.batchSize, step, config.seed);
    const shared = {
      ...(Object.fromEntries(Object.entries(scalars).map(([k, x]) => [k, tf.scalar(x)])) as Record<
        keyof typeof scalars,
        tf.Scalar
      >),
      ...{ ppgdC1: tf.tensor1d(ppgdC1), ppgdC2: tf.tensor1d(ppgdC2) },
    };
    const made: tf.Tensor[] = Object.values(shared);
    const track = <X extends Tensors>(tensors: X): X => {
      made.push(...Object.values(tensors));
      return tensors;
    };
    const rows = config.batchSize / R;
    const feedsOf = (r: number) =>
      track({
        tokens: tokenBatch(data, indices.slice(r * rows, (r + 1) * rows)),
        key: randomKey(config.seed, step * R + r),
      });
    let metrics: tf.Tensor;
    if (R === 1) metrics = track(await whole({ ...shared, ...feedsOf(0) })).metrics;
    else {
      const parts: { losses: tf.Tensor; l0: tf.Tensor }[] = [];
      for (let r = 0; r < R; r++)
        parts.push(
          track(await shard({ ...shared, ...feedsOf(r), ...track({ index: tf.scalar(r, 'int32') }) })),
        );
      const mean = (xs: tf.Tensor[]) => tf.tidy(() => tf.div(tf.addN(xs), R));
      const means = track({ losses: mean(parts.map(p => p.losses)), l0: mean(parts.map(p => p.l0)) });
      metrics = track(
        await update({ ...means, lrMain: shared.lrMain, c1: shared.c1, c2: shared.c2 }),
      ).metrics;
    }
    const values = (await metrics.data()) as Float32Array;
    tf.dispose(made);
    return values;
  };
}

/** V [dIn,C] ~ N(0, 1/dIn), U [C,dOut] ~ N(0, 1/C); CI function as PyTorch's nn.Linear: uniform ±1/√fan_in, biases too. */
export function initialParams(problem: Problem): Params {
  const { modules, config } = problem;
  const params: Params = {};
  let purpose: number = PURPOSE.init;
  const variable = (shape: number[], fill: (n: number, purpose: number) => Float32Array) => {
    const value = tf.tensor(fill(tf.util.sizeFromShape(shape), purpose++), shape);
    const result = tf.variable(value, false);
    value.dispose();
    return result;
  };
  const normal = (deviation: number) => (n: number, why: number) => {
    const u = uniformArray(2 * n, config.seed, 0, why); // Box-Muller
    return Float32Array.from(
      { length: n },
      (_, i) => deviation * Math.sqrt(-2 * Math.log(1 - u[2 * i]!)) * Math.cos(2 * Math.PI * u[2 * i + 1]!),
    );
  };
  const between = (bound: number) => (n: number, why: number) =>
    uniformArray(n, config.seed, 0, why).map(u => bound * (2 * u - 1));
  for (const { path: name, dIn, dOut, C } of modules) {
    params[`components.${name}.V`] = variable([dIn, C], normal(1 / Math.sqrt(dIn)));
    params[`components.${name}.U`] = variable([C, dOut], normal(1 / Math.sqrt(C)));
  }
  const shapes = ciShapes(problem);
  for (const [name, shape] of Object.entries(shapes)) {
    const fanIn = shapes[name.replace(/bias$/, 'weight')]![1]!;
    params[name] = variable(shape, between(1 / Math.sqrt(fanIn)));
  }
  return params;
}

/** Zeros shaped like the given variables. */
const zerosLike = (params: Params): Params =>
  Object.fromEntries(
    Object.entries(params).map(([n, p]) => [n, tf.tidy(() => tf.variable(tf.zeros(p.shape), false))]),
  );

/** The state of step 0: fresh parameters, moments 0, sources U(0, 1). */
export function initialState(problem: Problem, params: Params, rowLength: number): State {
  const { modules, config } = problem;
  const shape: [number, number] = [config.batchSize * rowLength, totalC(modules) + modules.length];
  return tf.tidy(() => ({
    ...{ params, m: zerosLike(params), v: zerosLike(params) },
    sources: {
      s: tf.variable(
        tf.tensor2d(uniformArray(shape[0] * shape[1], config.seed, 0, PURPOSE.sources), shape),
        false,
      ),
      m: tf.variable(tf.zeros(shape), false),
      v: tf.variable(tf.zeros(shape), false),
    },
    summed: config.microBatches > 1 ? zerosLike(params) : {},
  }));
}

/** Faithfulness warm-up: AdamW on V and U alone. Leaves the moments at 0. */
async function warmUp(
  engine: Engine,
  problem: Problem,
  state: State,
  report: (step: number, loss: number) => void,
): Promise<void> {
  const { config } = problem;
  const names = Object.keys(state.params).filter(isComponent);
  const step = engine.compile('warm-up', (feeds: { lrMain: tf.Tensor; c1: tf.Tensor; c2: tf.Tensor }) => {
    const { value, grads } = tf.valueAndGrads(() => faithfulnessLoss(problem, state.params))(
      names.map(n => state.params[n]!),
    );
    adamUpdate(state, Object.fromEntries(names.map((n, i) => [n, grads[i]!])), feeds);
    return { loss: value };
  });
  for (let i = 0; i < config.faithfulnessWarmupSteps; i++) {
    const lr =
      config.faithfulnessWarmupLr *
      cosine(i, config.faithfulnessWarmupSteps, config.faithfulnessWarmupLrFinalFrac);
    const feeds = {
      lrMain: tf.scalar(lr),
      c1: tf.scalar(1 - MAIN_BETAS.beta1 ** (i + 1)),
      c2: tf.scalar(1 - MAIN_BETAS.beta2 ** (i + 1)),
    };
    const { loss } = await step(feeds);
    report(i + 1, (await loss.data())[0]!);
    tf.dispose([loss, feeds]);
  }
  for (const moment of [...Object.values(state.m), ...Object.values(state.v)])
    moment.assign(tf.tidy(() => tf.zeros(moment.shape)));
}

// ---- J. Evaluation (method 6) ---------------------------------------------------------------------------------------

/** Metric names to values: numbers only, as in metrics.jsonl. */
export type Metrics = Record<string, number>;

/** Below this mean importance a component counts as dead, and kl_alive deletes it. */
const DEAD_BELOW = 1e-6;

/** Mean next-token cross-entropy in nats; the last position of a row predicts nothing. */
function crossEntropy(logProbs: T<'N vocab'>, tokens: T<'B S'>): tf.Tensor {
  const [B = 0, S = 0] = tokens.shape;
  const vocab = logProbs.shape[1]!;
  const predicted = tf.slice(logProbs.reshape([B, S, vocab]), [0, 0, 0], [B, S - 1, vocab]);
  const next = tf.oneHot(tf.slice(tokens, [0, 1], [B, S - 1]) as tf.Tensor2D, vocab);
  return tf.neg(tf.div(tf.sum(tf.mul(predicted, next)), B * (S - 1)));
}

/** Mean of (masked output − target output)² per module, modules [M]. */
function hiddenActsError(
  { target, modules }: Problem,
  tokens: T<'B S'>,
  pass: TargetPass,
  linear: Linear,
): T<'M'> {
  const outputs: Record<string, tf.Tensor> = {};
  targetForward(target, tokens, (name, x) => {
    outputs[name] = linear(name, x);
    return outputs[name];
  });
  return tf.stack(modules.map(m => tf.mean(tf.squaredDifference(outputs[m.path]!, pass.outputs[m.path]!))));
}

export interface Evaluation {
  metrics: Metrics;
  /** mean g of every component over the rows [ΣC] */
  meanCi: Float32Array;
}
type EvaluationOptions = { step: number; slow: boolean };

/** Compiles the evaluations once; the result evaluates the parameters as they then are on given rows. */
export function compileEvaluation(
  engine: Engine,
  problem: Problem,
  params: Params,
): (rows: Rows, options: EvaluationOptions) => Promise<Evaluation> {
  const { target, modules, config } = problem;
  const [sumC, M] = [totalC(modules), modules.length];
  const importances = (tokens: tf.Tensor) => {
    const pass = targetPass(target, tokens);
    const z = ciLogits(problem, params, ciInput(problem, pass), tokens.shape[1]!);
    return { pass, z, g: lowerLeaky(z, config.leakyAlpha), N: tokens.shape[0]! * tokens.shape[1]! };
  };
  const logitsUnder = (tokens: tf.Tensor, masks: Masks) =>
    targetForward(target, tokens, maskedLinear(problem, params, masks));

  const fast = engine.compile('evaluate', ({ tokens, key, p }: Record<'tokens' | 'key' | 'p', tf.Tensor>) => {
    const { pass, z, g, N } = importances(tokens);
    const draws = stochasticDraws(problem, N, key);
    const strategies: Record<string, Masks> = {
      ci_masked: { mask: g },
      unmasked: { mask: tf.ones([1, sumC]) },
      stochastic_masked: { mask: interpolate(g, draws.u), delta: draws.delta },
      random_masked: { mask: uniform([N, sumC], key, PURPOSE.randomMask) },
      rounded_masked: { mask: indicator(tf.greater(g, config.roundingThreshold)) },
      zero_masked: { mask: tf.zeros([1, sumC]) },
    };
    const out: Tensors = {
      'ce_kl/ce_target': crossEntropy(pass.logProbs, tokens),
      'loss/FaithfulnessLoss': faithfulnessLoss(problem, params),
      'loss/ImportanceMinimalityLoss': importanceLoss(upperLeaky(z, config.leakyAlpha), p, config),
      'loss/StochasticReconSubsetLoss': stochasticLoss(problem, params, tokens, pass, g, draws),
    };
    for (const [name, masks] of Object.entries(strategies)) {
      const logits = logitsUnder(tokens, masks);
      out[`ce_kl/kl_${name}`] = klLoss(pass, logits);
      out[`ce_kl/ce_difference_${name}`] = tf.sub(
        crossEntropy(tf.logSoftmax(logits), tokens),
        out['ce_kl/ce_target']!,
      );
    }
    return {
      ...out,
      meanCi: tf.mean(g, 0),
      active: tf.mean(indicator(tf.greater(g, config.ciAliveThreshold)), 0),
    };
  });

  // KL when every component with mean CI below 1e-6 is deleted (mask 0, delta 0) and all others stay on
  const alive = engine.compile('alive', ({ tokens, mask }: Record<'tokens' | 'mask', tf.Tensor>) => ({
    kl: klLoss(targetPass(target, tokens), logitsUnder(tokens, { mask })),
  }));

  // fresh PGD: one source [1, ΣC + M] for the whole batch; its KL, and where sign ascent takes it
  const pgd = engine.compile('pgd', ({ tokens, source }: Record<'tokens' | 'source', tf.Tensor>) => {
    const { pass, g } = importances(tokens);
    const { value, grads } = tf.valueAndGrads(s => adversarialLoss(problem, params, tokens, pass, g, s))([
      source,
    ]);
    return {
      kl: value,
      next: tf.clipByValue(tf.add(source, tf.mul(config.pgdEvalStepSize, tf.sign(grads[0]!))), 0, 1),
    };
  });

  const slowly = engine.compile('hidden acts', ({ tokens, key }: Record<'tokens' | 'key', tf.Tensor>) => {
    const { pass, g, N } = importances(tokens);
    const { u, delta } = stochasticDraws(problem, N, key);
    const error = (masks: Masks) =>
      hiddenActsError(problem, tokens, pass, maskedLinear(problem, params, masks));
    return { ci: error({ mask: g }), stochastic: error({ mask: interpolate(g, u), delta }) };
  });

  return async (rows, { step, slow }) => {
    const sums = new Map<string, number>();
    const add = (name: string, value: number, weight: number) =>
      sums.set(name, (sums.get(name) ?? 0) + value * weight);
    const [meanCi, active] = [new Float32Array(sumC), new Float32Array(sumC)];
    const numbers = async (t: tf.Tensor) => {
      const values = (await t.data()) as Float32Array;
      t.dispose();
      return values;
    };
    const p = tf.scalar(schedule(config, Math.min(step, config.nSteps - 1)).p);
    const size = config.evalBatchSize;
    const batches = Array.from({ length: Math.ceil(rows.count / size) }, (_, b) => {
      const indices = Array.from({ length: Math.min(size, rows.count - b * size) }, (_, i) => b * size + i);
      return {
        tokens: tokenBatch(rows, indices),
        key: randomKey(config.seed ^ 0x5eed, b),
        share: indices.length / rows.count,
      };
    });
    for (const { tokens, key, share } of batches) {
      const { meanCi: ci, active: on, ...scalars } = await fast({ tokens, key, p });
      for (const [name, value] of Object.entries(scalars)) add(name, (await numbers(value))[0]!, share);
      for (const [sum, part] of [
        [meanCi, await numbers(ci!)],
        [active, await numbers(on!)],
      ] as const) {
        for (let c = 0; c < sumC; c++) sum[c]! += part[c]! * share;
      }
      let source = tf.tidy(() => uniform([1, sumC + M], key, PURPOSE.pgdInit));
      for (let i = 0; i <= config.pgdEvalNSteps; i++) {
        const { kl, next } = await pgd({ tokens, source });
        if (i === config.pgdEvalNSteps) add('loss/PGDReconLoss', (await kl.data())[0]!, share);
        tf.dispose([kl, source]);
        source = next;
      }
      source.dispose();
      if (slow) {
        const { ci: ciError, stochastic } = await slowly({ tokens, key });
        for (const [kind, errors] of [
          ['CI', await numbers(ciError)],
          ['Stochastic', await numbers(stochastic)],
        ] as const) {
          for (const [i, m] of modules.entries())
            add(`loss/${kind}HiddenActsReconLoss/${m.path}`, errors[i]!, share);
          add(`loss/${kind}HiddenActsReconLoss/total`, errors.reduce((a, b) => a + b, 0) / M, share);
        }
      }
    }
    const mask = tf.tensor2d(
      meanCi.map(ci => Number(ci >= DEAD_BELOW)),
      [1, sumC],
    );
    for (const { tokens, share } of batches)
      add('ce_kl/kl_alive', (await numbers((await alive({ tokens, mask })).kl))[0]!, share);
    tf.dispose([p, mask, batches.flatMap(b => [b.tokens, b.key])]);

    const metrics: Metrics = Object.fromEntries([...sums].map(([name, value]) => [`eval/${name}`, value]));
    for (const name of [...sums.keys()].filter(n => n.startsWith('ce_kl/ce_difference_'))) {
      metrics[`eval/${name.replace('difference', 'unrecovered')}`] =
        sums.get(name)! / sums.get('ce_kl/ce_difference_zero_masked')!;
    }
    let total = 0;
    for (const { path: name, offset, C } of modules) {
      const l0 = active.subarray(offset, offset + C).reduce((a, b) => a + b, 0);
      metrics[`eval/l0/${config.ciAliveThreshold.toFixed(1)}_${name}`] = l0;
      total += l0;
    }
    metrics[`eval/l0/${config.ciAliveThreshold.toFixed(1)}_total`] = total;
    metrics['eval/n_alive'] = meanCi.reduce((n, ci) => n + Number(ci >= DEAD_BELOW), 0);
    return { metrics, meanCi };
  };
}

/** A rule that the data is known to follow, and the component that answers to it best. */
export interface RuleScore {
  name: string;
  description?: string;
  /** positions at which the rule is in force */
  support: number;
  component: { module: string; index: number };
  precision: number;
  recall: number;
  f1: number;
  /** KL without that component where the rule is in force, and elsewhere */
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
export interface Labels {
  rules: { name: string; description?: string }[];
  /** [row][position] -> the rules in force when the next token is predicted */
  labels: number[][][];
}

/** A component answers to a rule where its importance is above this. */
const FIRES_ABOVE = 0.1;

/**
 * The mechanism scoreboard: for every rule the component whose "g > 0.1" has the best F1 for "the rule is in force".
 * The rule is called causal if deleting that one component costs more than 0.1 nats where the rule is in force, and
 * less than a tenth of that elsewhere.
 */
export async function scoreRules(
  engine: Engine,
  problem: Problem,
  params: Params,
  rows: Rows,
  { rules, labels }: Labels,
): Promise<Scoreboard> {
  const { target, modules, config } = problem;
  const sumC = totalC(modules);
  const fires = engine.compile('fires', ({ tokens }: Record<'tokens', tf.Tensor>) => {
    const z = ciLogits(problem, params, ciInput(problem, targetPass(target, tokens)), rows.seqLen);
    return { fires: indicator(tf.greater(z, FIRES_ABOVE)) }; // where g > 0.1, z is too
  });
  const without = engine.compile('without', ({ tokens, mask }: Record<'tokens' | 'mask', tf.Tensor>) => {
    const { probs, logProbs } = targetPass(target, tokens);
    // every other component and all deltas stay on
    const masks = { mask, delta: tf.ones([1, modules.length]) };
    const logits = targetForward(target, tokens, maskedLinear(problem, params, masks));
    return { kl: tf.sum(tf.mul(probs, tf.sub(logProbs, tf.logSoftmax(logits))), 1) };
  });
  const tokens = tokenBatch(
    rows,
    Array.from({ length: rows.count }, (_, i) => i),
  );
  const active = (await (await fires({ tokens })).fires.data()) as Float32Array; // [N, ΣC]
  const inForce = labels.flat(); // by position

  const firings = new Float64Array(sumC);
  const both = rules.map(() => new Float64Array(sumC));
  const support = rules.map(() => 0);
  for (const [n, ruleIds] of inForce.entries()) {
    const row = active.subarray(n * sumC, (n + 1) * sumC);
    for (const r of ruleIds) support[r]!++;
    for (let c = 0; c < sumC; c++) {
      if (!row[c]) continue;
      firings[c]!++;
      for (const r of ruleIds) both[r]![c]!++;
    }
  }
  const scores: RuleScore[] = [];
  for (const [r, rule] of rules.entries()) {
    const f1 = (c: number) => (2 * both[r]![c]!) / Math.max(1, firings[c]! + support[r]!);
    let best = 0;
    for (let c = 1; c < sumC; c++) if (f1(c) > f1(best)) best = c;
    const mask = tf.tensor2d(
      Float32Array.from({ length: sumC }, (_, c) => Number(c !== best)),
      [1, sumC],
    );
    const kl = (await (await without({ tokens, mask })).kl.data()) as Float32Array;
    const mean = (wanted: boolean) => {
      const chosen = kl.filter((_, n) => inForce[n]!.includes(r) === wanted);
      return chosen.reduce((a, b) => a + b, 0) / Math.max(1, chosen.length);
    };
    const [klInForce, klElsewhere] = [mean(true), mean(false)];
    const m = modules.find(({ offset, C }) => best < offset + C)!;
    scores.push({
      ...rule,
      ...{ support: support[r]!, component: { module: m.path, index: best - m.offset }, f1: f1(best) },
      ...{
        precision: both[r]![best]! / Math.max(1, firings[best]!),
        recall: both[r]![best]! / Math.max(1, support[r]!),
      },
      ...{ klInForce, klElsewhere, causal: klInForce > 0.1 && klElsewhere < klInForce / 10 },
    });
    mask.dispose();
  }
  tokens.dispose();
  return {
    rules: scores,
    meanF1: scores.reduce((a, s) => a + s.f1, 0) / scores.length,
    nF1AtLeast80: scores.filter(s => s.f1 >= 0.8).length,
    nCausal: scores.filter(s => s.causal).length,
  };
}

// ---- K. Run folder --------------------------------------------------------------------------------------------------

/** What config.json holds. */
export interface RunRecord {
  formatVersion: 1;
  config: Config;
  model: { path: string; type: string; sha256: string };
  data: { path: string; trainRows: number; heldOutRows: number; seqLen: number };
  modules: Record<string, { dIn: number; dOut: number; C: number }>;
  engine: { name: string; version: string; description: string };
  versions: Record<string, string>;
  command: string[];
}

/** Writes a file so that a reader never sees half of it: beside, then renamed. */
export function writeAtomic(file: string, content: string): void {
  const temporary = `${file}.${process.pid}.tmp`;
  fs.writeFileSync(temporary, content);
  fs.renameSync(temporary, file);
}

/** The state under its names in state.safetensors. */
function stateTensors(state: State): Params {
  const named = (prefix: string, params: Params) =>
    Object.entries(params).map(([name, p]) => [`${prefix}.${name}`, p] as const);
  const { s, m, v } = state.sources;
  return Object.fromEntries([
    ...named('adam.m', state.m),
    ...named('adam.v', state.v),
    ['ppgd.s', s],
    ['ppgd.m', m],
    ['ppgd.v', v],
  ]);
}

async function* contents(
  variables: Params,
): AsyncGenerator<{ name: string; shape: number[]; data: Float32Array }> {
  for (const [name, variable] of Object.entries(variables))
    yield { name, shape: variable.shape, data: (await variable.data()) as Float32Array };
}

// ---- N. Command line ------------------------------------------------------------------------------------------------
// Standard output is the result, standard error the talk. Exit codes: 0, 1 failed, 2 bad input, 130/143 interrupted.

const VERSION = '0.1.0';
const talk = (line: string): void => void process.stderr.write(`${line}\n`);

/** Fills in what is "auto", and checks what one field alone can't tell. `given`: the fields that the user or a preset set. */
export function resolveConfig(
  config: Config,
  arch: Architecture,
  given: ReadonlySet<string>,
  onGpu: boolean,
): Config {
  const c = { ...config };
  if (!given.has('batchSize') && !onGpu) c.batchSize = 4;
  if (!given.has('seqLen')) c.seqLen = Math.min(c.seqLen, arch.context);
  // the paper's CI function is 8/3 as wide as its target and twice as deep; so is that of the small public preset
  c.ciNHeads ||= Math.min(16, Math.max(4, Math.round((arch.dModel * 8) / 3 / 64)));
  c.ciDModel ||= Math.max(1, Math.round((arch.dModel * 8) / 3 / (16 * c.ciNHeads))) * 16 * c.ciNHeads;
  c.ciNBlocks ||= 2 * arch.nLayers;
  c.ciMlpHidden ||= 4 * c.ciDModel;
  c.evalBatchSize ||= c.batchSize;
  if (c.batchSize % c.microBatches !== 0)
    throw new UsageError(`--micro-batches ${c.microBatches} does not divide --batch-size ${c.batchSize}`);
  if (c.ciDModel % (2 * c.ciNHeads) !== 0)
    throw new UsageError(
      `--ci-d-model ${c.ciDModel} is not an even number for each of --ci-n-heads ${c.ciNHeads}`,
    );
  if (c.seqLen > arch.context)
    throw new UsageError(`--seq-len ${c.seqLen}: the target's ${arch.contextField} is ${arch.context}`);
  return c;
}

/** The target's own next-token loss on held-out rows, in nats: a wrongly loaded model shows here. */
async function targetLoss(engine: Engine, target: Target, rows: Rows, batchSize: number): Promise<number> {
  const tokens = tokenBatch(
    rows,
    Array.from({ length: Math.min(rows.count, batchSize) }, (_, i) => i),
  );
  const loss = engine.compile('target loss', (feeds: { tokens: tf.Tensor }) => ({
    loss: crossEntropy(tf.logSoftmax(targetForward(target, feeds.tokens)), feeds.tokens),
  }));
  const result = await loss({ tokens });
  const [value] = await result.loss.data();
  tf.dispose([tokens, result]);
  return value!;
}

/** A run, opened: everything that decompose, eval and harvest share. */
async function openRun(config: Config, given: ReadonlySet<string>) {
  if (!config.model)
    throw new UsageError('--model: missing; takes a Hugging Face folder, a hub id, or a --preset');
  if (!config.data) throw new UsageError('--data: missing; takes a .txt, .jsonl or .json file');
  const engine = await startEngine(config);
  talk(`engine   ${engine.description}`);
  const target = loadTarget(await resolveModel(config.model));
  const full = resolveConfig(config, target.arch, given, engine.gpu);
  const data = loadData(target, full);
  full.seqLen = data.train.seqLen;
  const modules = chooseModules(target.linears, full.components);
  const problem: Problem = { target, modules, config: full };
  talk(
    `target   ${config.model}: ${target.arch.type}, ${target.arch.nLayers} layers, width ${target.arch.dModel}, vocabulary ${target.arch.vocab}`,
  );
  talk(
    `data     ${data.train.count} training rows and ${data.heldOut.count} held-out rows of ${full.seqLen} tokens`,
  );
  talk(`modules  ${modules.length} with ${totalC(modules)} components`);
  return { engine, problem, data, heldOut: firstRows(data.heldOut, full.evalBatchSize) };
}
const firstRows = (rows: Rows, n: number): Rows => ({ ...rows, count: Math.min(n, rows.count) });

/** Progress of a long loop: one line that is rewritten on a terminal, plain lines now and then elsewhere. */
function startProgress(first = 0) {
  const started = performance.now();
  const live = process.stderr.isTTY === true;
  let shown = -Infinity;
  return {
    show(done: number, total: number, text: () => string): void {
      const now = performance.now();
      if (now - shown < (live ? 100 : 10_000) && done !== total) return;
      shown = now;
      const perStep = (now - started) / Math.max(1, done - first);
      const left = Math.round((perStep * (total - done)) / 1000);
      const line = `${text()}  ${perStep.toFixed(0)} ms/step  ${Math.floor(left / 60)}:${String(left % 60).padStart(2, '0')} left`;
      process.stderr.write(live ? `\r\x1b[K${line}${done === total ? '\n' : ''}` : `${line}\n`);
    },
  };
}

/** The labels of --labels, with the held-out rows that they belong to. */
function readLabels(file: string, rows: Rows): Labels & { rows: Rows } {
  const { rules, labels } = readJson(file) as unknown as Labels;
  const fits =
    Array.isArray(rules) &&
    Array.isArray(labels) &&
    labels.every(l => Array.isArray(l) && l.length === rows.seqLen);
  if (!fits || labels.length > rows.count) {
    throw new UsageError(
      `${file}: takes {"rules": [{"name"}…], "labels": [row][position][rule ids]} for the rows of --eval-data`,
    );
  }
  return { rules, labels, rows: firstRows(rows, labels.length) };
}

function runRecord({ target, modules, config }: Problem, data: Data, engine: Engine): RunRecord {
  return {
    formatVersion: 1,
    config,
    model: { path: config.model, type: target.arch.type, sha256: target.sha256 },
    data: {
      path: config.data,
      trainRows: data.train.count,
      heldOutRows: data.heldOut.count,
      seqLen: config.seqLen,
    },
    modules: Object.fromEntries(modules.map(({ path: name, dIn, dOut, C }) => [name, { dIn, dOut, C }])),
    engine: { name: engine.name, version: engine.version, description: engine.description },
    versions: {
      'nano-param-decomp': VERSION,
      node: process.versions.node,
      '@tensorflow/tfjs': tf.version.tfjs,
    },
    command: process.argv.slice(2),
  };
}

async function decompose(config: Config, given: ReadonlySet<string>, resume: boolean): Promise<void> {
  const { engine, problem, data, heldOut } = await openRun(config, given);
  const { target, config: c } = problem;
  const labels = c.labels ? readLabels(c.labels, data.heldOut) : undefined;
  talk(
    `loss     the target's own, on held-out rows: ${(await targetLoss(engine, target, heldOut, c.evalBatchSize)).toFixed(4)} nats/token`,
  );
  const dir =
    c.out ||
    path.join(
      'runs',
      `${path.basename(c.model)}-${new Date().toISOString().slice(0, 19).replace(/[:T]/g, '-')}`,
    );
  if (fs.existsSync(path.join(dir, 'config.json')) !== resume) {
    throw new UsageError(
      resume
        ? `${dir}: no run to resume here`
        : `${dir}: holds a run already; --resume goes on with it, or take another --out`,
    );
  }
  fs.mkdirSync(dir, { recursive: true });
  const record = runRecord(problem, data, engine);
  writeAtomic(path.join(dir, 'config.json'), `${JSON.stringify(record, null, 1)}\n`);

  const params = initialParams(problem);
  const state = initialState(problem, params, data.train.seqLen);
  const run = startProgress();
  await warmUp(engine, problem, state, (step, loss) =>
    run.show(
      step,
      c.faithfulnessWarmupSteps,
      () => `warm-up ${step}/${c.faithfulnessWarmupSteps}  faithfulness ${loss.toExponential(2)}`,
    ),
  );
  const step = compileStep(engine, problem, state);
  const evaluate = compileEvaluation(engine, problem, params);
  const log = (n: number, metrics: Metrics) =>
    fs.appendFileSync(path.join(dir, 'metrics.jsonl'), `${JSON.stringify({ step: n, ...metrics })}\n`);
  let last: Evaluation | undefined;
  const main = startProgress();
  for (let n = 0; n < c.nSteps; n++) {
    const started = performance.now();
    const values = await step(n, data.train);
    const metrics: Metrics = Object.fromEntries(STEP_METRICS.map((name, i) => [name, values[i]!]));
    const done = n + 1;
    const every = (frequency: number) => done === c.nSteps || (frequency > 0 && done % frequency === 0);
    if (every(c.logEvery)) {
      const { lrMain, lrPpgd, p } = schedule(c, n);
      const { numTensors, numBytes } = tf.memory();
      log(done, {
        ...metrics,
        'lr/main': lrMain,
        'lr/ppgd': lrPpgd,
        p,
        'time/ms_per_step': performance.now() - started,
        'memory/tensors': numTensors,
        'memory/bytes': numBytes,
      });
    }
    main.show(
      done,
      c.nSteps,
      () =>
        `step ${done}/${c.nSteps}  loss ${LOSSES.map(l => `${l} ${metrics[`loss/${l}`]!.toPrecision(3)}`).join('  ')}  L0 ${metrics['train/l0']!.toFixed(1)}`,
    );
    if (every(c.evalFreq)) {
      last = await evaluate(heldOut, { step: done, slow: every(c.slowEvalFreq) });
      log(done, last.metrics);
    }
    await new Promise(setImmediate); // lets signals and timers through
  }
  console.log(JSON.stringify(last!.metrics, null, 1));
  if (labels) {
    const board = await scoreRules(engine, problem, params, labels.rows, labels);
    console.log(board.meanF1, board.nF1AtLeast80, board.nCausal);
  }
}

const resolveModel = async (m: string) => m;
if (process.argv[1] && fs.realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const given: Record<string, string> = {};
  for (const a of process.argv.slice(2)) {
    const [k, v] = a.split('=');
    given[k!.replace(/^--/, '').replace(/-([a-z])/g, (_, c) => c.toUpperCase())] = v!;
  }
  const preset = PRESETS[given.preset ?? ''];
  delete given.preset;
  const config = { ...DEFAULTS, ...preset?.config } as Config;
  for (const [k, v] of Object.entries(given))
    (config as Record<string, unknown>)[k] = checkField(k as keyof Config, v);
  await decompose(config, new Set([...Object.keys(preset?.config ?? {}), ...Object.keys(given)]), false);
}
