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
 *   K. The run           its folder: config, metrics, checkpoints; the training loop
 *   L. Harvest           what every component does; the scoreboard of known rules
 *   M. Command line      the jobs: decompose, eval, harvest
 *
 * engine/ holds what makes TFJS fast, io/ what stands between this file and the world: flags, hub, corpora, more model
 * families, files from strangers, checkpoints that survive a crash. It knows nothing of the method, and is optional:
 * where it is missing, the plain ways written here are taken.
 *
 * Left out on purpose: several GPUs, embeddings and unembeddings as modules, targets other than decoder language
 * models, hyperparameter search, experiment trackers.
 *
 * Conventions: N = B·S positions; activations are [N, ·] matrices (only attention unfolds B and S). A module has C
 * components; ΣC are those of all M modules side by side, modules sorted by path ("wide" tensors).
 */
import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as path from 'node:path';
import { fileURLToPath } from 'node:url';
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
/** What the job gives; what it throws is a refusal of `where`: a file, or a line of one. */
function orRefuse<X>(where: string, job: () => X): X {
  try {
    return job();
  } catch (error) {
    return refuse(`${where}: ${(error as Error).message}`);
  }
}
function readJson(file: string): Record<string, unknown> {
  const value = orRefuse(file, () => JSON.parse(fs.readFileSync(file, 'utf8')));
  return typeof value === 'object' && value && !Array.isArray(value) ? value : refuse(`${file}: not an object`);
}

/** A part of engine/ or assets/, by import(); undefined where that file is missing (but not what it imports itself). */
const optional = <M>(part: Promise<M>): Promise<M | undefined> =>
  part.catch((error: NodeJS.ErrnoException) => {
    if (!error.message.endsWith(`imported from ${fileURLToPath(import.meta.url)}`)) throw error;
    return undefined;
  });

/** Standard output is the result, standard error the talk. */
const talk = (line: string): void => void process.stderr.write(`${line}\n`);

const sizeOf = (shape: readonly number[]) => shape.reduce((n, d) => n * d, 1);
const range = (from: number, to: number) => Array.from({ length: Math.max(0, to - from) }, (_, i) => from + i);
/** 0 … count − 1 in batches of `size`, the last one maybe shorter. */
const inBatches = (count: number, size: number): number[][] =>
  range(0, Math.ceil(count / size)).map(b => range(b * size, Math.min((b + 1) * size, count)));
const sum = (values: Iterable<number>): number => [...values].reduce((total, value) => total + value, 0);

// ---- A. Config ------------------------------------------------------------------------------------------------------
// One record gives each field its type, default, bounds, flag (kebab-case) and line in --help. Defaults are the paper's
// run (method 5); "0 = auto" are sizes that follow the target, by a rule that gives the paper's at the paper's target.

export type Value = string | number | boolean;
type Bounds = { min?: number; max?: number; integer?: boolean };
/** `choices`: one of these words; `place`: a file, a folder, or a name on the hub. */
export type Field<V> = { value: V; help: string; choices?: string; place?: boolean } & Bounds;
const real = (value: number, help: string, min = 0, max = 1e12): Field<number> => ({ value, help, min, max });
const int = (value: number, help: string, min = 0, max = 1e9) => ({ ...real(value, help, min, max), integer: true });
const text = (value: string, help: string, choices = ''): Field<string> => ({ value, help, choices });
const place = (help: string): Field<string> => ({ value: '', help, place: true });
const flag = (value: boolean, help: string): Field<boolean> => ({ value, help });

const GROUPS = {
  'Target and data': {
    model: place('Hugging Face folder, or hub id org/name[@revision]'),
    data: place('training data: .txt, .jsonl, .json rows of ids, or a hub dataset org/name'),
    evalData: place('held-out data; without it the last 5 % of the documents, never trained on'),
    labels: place('JSON with the rules in force in the rows of --eval-data: adds a scoreboard'),
    seqLen: int(512, 'tokens in a row, at most what the target allows', 2, 1 << 20),
    components: text('auto', 'pattern=C, first match wins: "*.q_proj=64,*.mlp.*=172"; auto: all, C = max(dIn, dOut)'),
    out: place('run folder; without it runs/<model>-<time>'),
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
export type Config = { [K in keyof Fields]: Fields[K]['value'] };
const FIELDS: Record<string, Field<Value>> = Object.assign({}, ...Object.values(GROUPS));
export const DEFAULTS = Object.fromEntries(Object.entries(FIELDS).map(([k, f]) => [k, f.value])) as Config;

const bundled = (file: string) => fileURLToPath(new URL(`assets/toy/${file}`, import.meta.url));
/** Named settings: their source, what differs from the defaults, and the target that they are meant for. */
type Preset = { source: string; target?: Partial<Architecture>; config: Partial<Config> };
// biome-ignore format: a line for what belongs together
export const PRESETS: Record<string, Preset> = {
  toy: {
    source: 'ours: the bundled one-layer target with known rules',
    config: {
      model: bundled(''), data: bundled('corpus.txt'), evalData: bundled('eval.json'), labels: bundled('labels.json'),
      components: '*.attn.*=48,*.mlp.*=128', seqLen: 32, batchSize: 16, nSteps: 2000, mainLr: 7e-3,
      coeffFaith: 1e4, coeffImp: 5e-4, impBeta: 4, ppgdLr: 0.05, seed: 0,
      faithfulnessWarmupLr: 5e-3, faithfulnessWarmupLrFinalFrac: 0.05,
      ciDModel: 64, ciNBlocks: 1, ciNHeads: 4, ciMlpHidden: 256,
      evalFreq: 1000, slowEvalFreq: 0, evalBatchSize: 128, saveEvery: 1000,
    },
  },
  'simplestories-2L': {
    source: "the original's small public preset for its 2-layer SimpleStories target; method 5",
    target: { nLayers: 2, dModel: 192, nHeads: 6, vocab: 4019 },
    config: {
      components: '*.q_proj=288,*.k_proj=288,*.v_proj=384,*.o_proj=480,*.c_fc=1152,*.down_proj=960',
      ciDModel: 512, ciNBlocks: 4, ciNHeads: 8, ciMlpHidden: 2048, coeffImp: 1e-3, mainLr: 3e-4,
    },
  },
  'pile-4L': {
    source: "the paper's run on its 4-layer Pile target, 400k steps of 64 x 512 tokens; method 5",
    target: { nLayers: 4, dModel: 768, nHeads: 6, dMlp: 3072, vocab: 50_277 },
    config: {
      components: '*.q_proj=512,*.k_proj=512,*.v_proj=1024,*.o_proj=1024,*.c_fc=3072,*.down_proj=3584',
      batchSize: 64, seqLen: 512, ciDModel: 2048, ciNBlocks: 8, ciNHeads: 16, ciMlpHidden: 8192,
    },
  },
};

// ---- B. Engine ------------------------------------------------------------------------------------------------------
// The maths is plain TFJS. What makes an engine fast (the traced graph, better WASM kernels) is in engine/ and
// optional: without that folder everything runs op by op.

export interface Engine {
  readonly name: string;
  readonly gpu: boolean;
  readonly description: string; // a line for people: which engine, and why
  memoryBytes?(): number; // of the GPU, or of the machine
  /**
   * A function with the same meaning as `fn`, and faster where the engine can trace it: `fn` is then run once as it is
   * and from then on as one graph. So whatever changes from call to call must enter through `feeds`, and no branch of
   * JavaScript may depend on a tensor's value. `fn` may assign tf.Variables: those are the state.
   */
  compile<F extends Tensors, O extends Tensors>(name: string, fn: (feeds: F) => O): (feeds: F) => Promise<O>;
}
/** Right on every engine, and what a traced graph is compared with. */
const opByOp: Pick<Engine, 'compile'> = { compile: (_name, fn) => async feeds => tf.tidy(() => fn(feeds)) };

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

/** Starts the engine that the config asks for: by itself TensorFlow if it loads, else WASM. @throws UsageError */
export async function startEngine(options: Config): Promise<Engine> {
  const part = await optional(import('./engine/index.ts'));
  if (part) return { ...opByOp, ...(await part.startEngine(options)) };
  const packages = { tensorflow: '@tensorflow/tfjs-node-gpu', wasm: '@tensorflow/tfjs-backend-wasm' };
  for (const [name, from] of Object.entries(packages)) {
    if (options.engine !== 'auto' && options.engine !== name) continue;
    const loaded = await import(from).catch(() => undefined);
    if (loaded && (await tf.setBackend(name))) break;
  }
  await tf.ready();
  const name = tf.getBackend();
  const { engine, precision } = options;
  const fits = [name, 'auto'].includes(engine) && ['float32', 'auto'].includes(precision);
  if (!fits) refuse(`--engine ${engine}, --precision ${precision}: not without engine/`);
  return { ...opByOp, name, gpu: false, description: `${name}, op by op (no engine/ folder)` };
}

/** What a random number is for. With the seed and the step it is its whole address, so a step can be replayed. */
// biome-ignore format: a line each takes ten lines
const PURPOSE = {
  mask: 1, delta: 2, route: 3, routeCount: 4, randomMask: 5, pgd: 6, shuffle: 7, sources: 8, harvest: 9,
  init: 16, // and on from there, one for each random tensor
};

/** The part of the address that changes from step to step: a tensor, since it must enter a traced graph as a feed. */
export const randomKey = (seed: number, step: number): tf.Tensor1D => tf.tensor1d([scramble(seed), step], 'int32');

/** Uniform numbers in [0, 1), a function of (key, purpose) alone; each engine has its own bits. */
export function uniform(shape: number[], key: tf.Tensor, purpose: number): tf.Tensor {
  if (tf.getBackend() !== 'tensorflow') {
    const [seed = 0, step = 0] = key.dataSync();
    return tf.tensor(uniformArray(sizeOf(shape), seed, step, purpose), shape);
  }
  // biome-ignore lint/suspicious/noExplicitAny: a method of tfjs-node, whose types are not there without it
  const backend = tf.backend() as any;
  const { binding } = backend;
  const types = { dtype: binding.TF_FLOAT, T: binding.TF_INT32, Tseed: binding.TF_INT32 };
  const attrs = Object.entries(types).map(([name, value]) => ({ name, type: binding.TF_ATTR_TYPE, value }));
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
// A Hugging Face folder: config.json names the architecture, safetensors files hold the weights. A safetensors file is
// the length of its header in 8 bytes, the header (JSON), then the tensors' bytes side by side.

/** The number behind 16 bits: a sign, 5 bits of exponent (0: subnormal, 31: infinity and NaN), 10 bits of mantissa. */
const HALF_FLOATS = Float32Array.from({ length: 65536 }, (_, bits) => {
  const [sign, exponent, mantissa] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (exponent ? (1024 + mantissa) * 2 ** (exponent - 25) : mantissa * 2 ** -24);
});
export const DECODERS: Record<string, (bytes: ArrayBuffer) => ArrayLike<number>> = {
  F32: bytes => new Float32Array(bytes),
  F16: bytes => new Float32Array(new Uint16Array(bytes)).map(bits => HALF_FLOATS[bits]!),
  BF16: bytes => new Float32Array(new Uint32Array(new Uint16Array(bytes)).map(upperHalf => upperHalf << 16).buffer),
  F64: bytes => new Float64Array(bytes),
};

/** Of an honest file, read whole; io/safetensors.ts reads tensor by tensor, and files from strangers. */
export function plainSafetensors(file: string) {
  const bytes = orRefuse(file, () => fs.readFileSync(file));
  const start = orRefuse(file, () => 8 + Number(bytes.readBigUInt64LE()));
  const header = orRefuse(file, () => JSON.parse(bytes.toString('utf8', 8, start)));
  type Entry = { dtype: string; shape: number[]; data_offsets: [number, number] };
  const tensors = new Map(Object.entries<Entry>(header).filter(([name]) => name !== '__metadata__'));
  const readFloat32 = (name: string): Float32Array => {
    const { dtype, data_offsets } = tensors.get(name)!;
    const decode = DECODERS[dtype] ?? refuse(`${file}: ${name} is ${dtype}; takes ${Object.keys(DECODERS)}`);
    const [begin = 0, end = 0] = data_offsets.map(offset => start + offset);
    if (end > bytes.length) refuse(`${file}: ends too early, within the tensor ${name}`);
    return Float32Array.from(decode(new Uint8Array(bytes.subarray(begin, end)).buffer)); // a copy: aligned
  };
  return { tensors, readFloat32, close: () => {} };
}

/** What a config.json says, in one vocabulary for all architectures: the options of the one decoder below. */
// biome-ignore format: what belongs together on one line
export interface Architecture {
  type: string; names: Names;
  vocab: number; dModel: number; dMlp: number; nLayers: number; nHeads: number; nKvHeads: number; headDim: number;
  context: number; contextField: string; // longest row: what positions there are, or the window of sliding attention
  norm: 'rms' | 'layer'; eps: number;
  rotary: Float32Array | undefined; // inverse wavelength of each rotated pair of a head; undefined: learned positions
  qkv: 'separate' | 'concatenated' | 'by head'; // one layer each, or one for all (its name is that of q)
  conv1d: boolean; // linear layers are stored as [dIn,dOut], not as nn.Linear's [dOut,dIn]
  activation: keyof typeof ACTIVATIONS;
  parallelResidual: boolean; // the MLP reads the attention's input, not its output
  biased: RegExp | undefined; // paths of linear layers that must have a bias; others may
  tied: boolean; // the head is the embedding, unless the file has one
}
/** State-dict names without `.weight`, those of a block within it. What an architecture lacks is left out. */
// biome-ignore format: in the network's order
export interface Names {
  embed: string; positions?: string; blocks: string; last: string; head: string;
  norm1: string; q: string; k?: string; v?: string; qNorm?: string; kNorm?: string; o: string;
  norm2: string; gate?: string; up: string; down: string;
}
// biome-ignore format: in the network's order
export const NAMES: Record<'llama' | 'llama_simple_mlp', Names> = {
  llama: {
    embed: 'model.embed_tokens', blocks: 'model.layers', last: 'model.norm', head: 'lm_head',
    norm1: 'input_layernorm', q: 'self_attn.q_proj', k: 'self_attn.k_proj', v: 'self_attn.v_proj', o: 'self_attn.o_proj',
    norm2: 'post_attention_layernorm', gate: 'mlp.gate_proj', up: 'mlp.up_proj', down: 'mlp.down_proj',
  },
  llama_simple_mlp: {
    embed: 'wte', blocks: 'h', last: 'ln_f', head: 'lm_head',
    norm1: 'rms_1', q: 'attn.q_proj', k: 'attn.k_proj', v: 'attn.v_proj', o: 'attn.o_proj',
    norm2: 'rms_2', up: 'mlp.c_fc', down: 'mlp.down_proj',
  },
};
const nameOf = ({ names }: Architecture, part: keyof Names, i: number) => `${names.blocks}.${i}.${names[part]}`;

/** Of a plain Llama or the paper's own model; io/models.ts reads seven families, and checks every field. */
// biome-ignore lint/suspicious/noExplicitAny: fields of a config.json
export function plainArchitecture(config: Record<string, any>, file: string): Architecture {
  const { model_type: type, num_attention_heads: nHeads, hidden_size: dModel, rope_theta: theta = 10_000 } = config;
  const needs = (what: string) => refuse(`${file}: ${what} needs io/models.ts`);
  const names: Names = Object.hasOwn(NAMES, type) ? NAMES[type as keyof typeof NAMES] : needs(`model_type ${type}`);
  const activation = config.hidden_act ?? (names.gate ? 'silu' : 'gelu_new');
  if (!Object.hasOwn(ACTIVATIONS, activation)) needs(`hidden_act ${activation}`);
  for (const field of ['rope_scaling', 'rope_parameters']) if (config[field]) needs(field);
  const headDim = config.head_dim ?? dModel / nHeads;
  // biome-ignore format: what belongs together on one line
  return {
    type, names, activation, dModel, nHeads, headDim, nKvHeads: config.num_key_value_heads ?? nHeads,
    vocab: config.vocab_size, dMlp: config.intermediate_size, nLayers: config.num_hidden_layers,
    context: config.max_position_embeddings ?? 2048, contextField: 'max_position_embeddings',
    norm: 'rms', eps: config.rms_norm_eps ?? 1e-6,
    rotary: inverseWavelengths(headDim, theta),
    qkv: 'separate', conv1d: false, parallelResidual: false, biased: undefined,
    tied: config.tie_word_embeddings ?? type === 'llama_simple_mlp',
  };
}

/** A linear layer of the target's blocks: y = x Wᵀ + b. */
export type LinearLayer = { path: string; dIn: number; dOut: number };

/** The frozen network. */
export interface Target {
  readonly arch: Architecture;
  readonly linears: readonly LinearLayer[]; // all of the blocks, in network order
  /** by state-dict name; a linear layer's Wᵀ [dIn,dOut] under its path. Variables: state of a traced graph */
  readonly weights: ReadonlyMap<string, tf.Variable>;
  readonly dir: string;
  readonly config: Readonly<Record<string, unknown>>; // of Hugging Face, as it is
  readonly sha256: string;
}

/** The linear layers of an architecture's blocks, in network order. */
export function linearLayers(arch: Architecture): LinearLayer[] {
  const { dModel, dMlp, nLayers, nHeads, nKvHeads, headDim, qkv } = arch;
  const [dQ, dKv] = [nHeads * headDim, nKvHeads * headDim];
  // biome-ignore format: [dIn, dOut] in the network's order
  const sizes: [keyof Names, number, number][] = [
    ['q', dModel, qkv === 'separate' ? dQ : 3 * dQ], ['k', dModel, dKv], ['v', dModel, dKv], ['o', dQ, dModel],
    ['gate', dModel, dMlp], ['up', dModel, dMlp], ['down', dMlp, dModel],
  ];
  const present = sizes.filter(([part]) => arch.names[part]);
  const ofBlock = (i: number) => present.map(([part, dIn, dOut]) => ({ path: nameOf(arch, part, i), dIn, dOut }));
  return range(0, nLayers).flatMap(ofBlock);
}

/** Loads a Hugging Face folder. @throws UsageError naming the file and what is wrong with it */
export async function loadTarget(dir: string): Promise<Target> {
  const models = await optional(import('./io/index.ts'));
  const json = path.join(dir, 'config.json');
  const [configFile, config] = models?.readYaml(dir) ?? [json, readJson(json)];
  const arch = models?.readArchitecture(config, configFile, NAMES) ?? plainArchitecture(config, configFile);
  const { names, conv1d, vocab, dModel, headDim, nLayers } = arch;
  const linears = linearLayers(arch);
  const weights = new Map<string, tf.Variable>();
  const sha256 = crypto.createHash('sha256').update(fs.readFileSync(configFile));
  const files = (models?.weightFiles(dir) ?? ['model.safetensors']).map(name => path.join(dir, name));
  const careful = await optional(import('./io/index.ts'));
  const opened = careful ? await careful.openShards(files, DECODERS) : plainSafetensors(files[0]!);
  const { tensors, readFloat32, close } = opened;
  const used = new Set<string>();
  // gpt2 is published with and without a prefix, gpt_neox with two names of its head
  const stored = (name: string) =>
    [name, `transformer.${name}`, name.replace('embed_out', 'lm_head')].find(n => tensors.has(n));
  const load = (name: string, shape: number[], key = name, transposed = false): void => {
    const source = stored(name) ?? refuse(`${dir}: the safetensors files have no tensor ${name}`);
    const got = tensors.get(source)!.shape;
    if (got.join() !== shape.join()) refuse(`${dir}: ${source} is [${got}], config.json implies [${shape}]`);
    used.add(source);
    const data = readFloat32(source);
    sha256.update(source).update(data);
    weights.set(key, makeVariable(data, shape, transposed));
  };
  const loadNorm = (name: string) => {
    load(`${name}.weight`, [dModel]);
    if (arch.norm === 'layer') load(`${name}.bias`, [dModel]);
  };
  try {
    load(`${names.embed}.weight`, [vocab, dModel]);
    if (names.positions) load(`${names.positions}.weight`, [arch.context, dModel]);
    for (const { path: name, dIn, dOut } of linears) {
      load(`${name}.weight`, conv1d ? [dIn, dOut] : [dOut, dIn], name, !conv1d); // as Wᵀ: no transposed product later
      if (arch.biased?.test(name) || stored(`${name}.bias`)) load(`${name}.bias`, [dOut]);
    }
    for (const i of range(0, nLayers)) {
      for (const part of ['norm1', 'norm2'] as const) loadNorm(nameOf(arch, part, i));
      for (const part of ['qNorm', 'kNorm'] as const)
        if (names[part]) load(`${nameOf(arch, part, i)}.weight`, [headDim]);
    }
    loadNorm(names.last);
    const head = `${names.head}.weight`;
    if (stored(head)) load(head, [vocab, dModel]);
    else if (!arch.tied) refuse(`${dir}: ${head} is missing and tie_word_embeddings is false`);
    const buffers = /\.(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))$/; // which no forward needs
    const others = [...tensors.keys()].filter(name => !used.has(name) && !buffers.test(name));
    if (others.length > 0) refuse(`${dir}: ${arch.type} has no use for the tensors ${others.slice(0, 5).join(', ')}`);
  } finally {
    close();
  }
  return { arch, linears, weights, dir, config, sha256: sha256.digest('hex') };
}

/** A variable, of the target or moved by our own Adam: `trainable` only concerns TFJS's optimisers. */
const makeVariable = (data: Float32Array, shape: number[], transposed = false): tf.Variable =>
  tf.tidy(() => tf.variable(transposed ? tf.transpose(tf.tensor(data, shape)) : tf.tensor(data, shape), false));

/** How a linear layer is computed: by the target itself, or in one of the masked forwards of section E. */
export type Linear = (path: string, x: T<'N dIn'>) => T<'N dOut'>;

const weight = ({ weights }: Target, name: string): tf.Tensor => weights.get(name) ?? refuse(`no weight ${name}`);
/** All products are [N,k] x [k,m]: TFJS's own 3-D x 2-D matMul has no gradient. */
const matmul = (a: T<'n k'>, b: T<'k m'>, transposeB = false): T<'n m'> =>
  tf.matMul(a as tf.Tensor2D, b as tf.Tensor2D, false, transposeB);
/** 1 where the condition holds, else 0. */
const indicator = (condition: T): T => tf.cast(condition, 'float32');
const addBias = (y: T<'N dOut'>, bias: T<'dOut'> | undefined): T<'N dOut'> => (bias ? tf.add(y, bias) : y);
export function ownLinear(target: Target): Linear {
  return (name, x) => addBias(matmul(x, weight(target, name)), target.weights.get(`${name}.bias`));
}

const gelu = (x: T): T => tf.mul(tf.mul(0.5, x), tf.add(1, tf.erf(tf.mul(x, Math.SQRT1_2))));
const geluTanh = (x: T): T => {
  const inner = tf.mul(Math.sqrt(2 / Math.PI), tf.add(x, tf.mul(0.044715, tf.mul(x, tf.mul(x, x)))));
  return tf.mul(tf.mul(0.5, x), tf.add(1, tf.tanh(inner)));
};
const silu = (x: T): T => tf.mul(x, tf.sigmoid(x));
const ACTIVATIONS = { silu, relu: (x: T): T => tf.relu(x), gelu, gelu_new: geluTanh, gelu_pytorch_tanh: geluTanh };

/** y = x r, r = 1 / √(mean x² + ε), last axis. TFJS's own gradient has 3 x the ops: dx = r (dy − y mean(y dy)). */
export const rmsNormalize = (x: T, eps: number): T =>
  tf.customGrad((a, save) => {
    const r = tf.rsqrt(tf.add(tf.mean(tf.square(a as T), -1, true), eps));
    const y = tf.mul(a as T, r);
    (save as tf.GradSaveFunc)([y, r]);
    const gradFunc = (dy: T, [y, r]: T[]) => tf.mul(r!, tf.sub(dy, tf.mul(y!, tf.mean(tf.mul(y!, dy), -1, true))));
    return { value: y, gradFunc };
  })(x);

function norm(target: Target, name: string, x: T<'N d'>): T<'N d'> {
  const { norm, eps } = target.arch;
  const centred = norm === 'layer' ? tf.sub(x, tf.mean(x, -1, true)) : x;
  const scaled = tf.mul(rmsNormalize(centred, eps), weight(target, `${name}.weight`));
  return addBias(scaled, target.weights.get(`${name}.bias`));
}

/** Of the pairs that a rotary embedding turns. */
const inverseWavelengths = (headDim: number, base: number): Float32Array =>
  Float32Array.from(range(0, headDim / 2), i => base ** ((-2 * i) / headDim));

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

/** [N, H·hd] -> [B,H,S,hd] */
const toHeads = (x: T<'N d'>, B: number, S: number, H: number): T<'B H S hd'> =>
  x.reshape([B, S, H, x.size / (B * S * H)]).transpose([0, 2, 1, 3]);

/** softmax(q kᵀ / √hd) v; fewer k, v heads (H') than q heads each serve a group. q [B,H,S,hd], k, v [B,H',S,hd] */
function attend(q: T<'B H S hd'>, k: T<'B H S hd'>, v: T<'B H S hd'>, causal: boolean): T<'N d'> {
  const [B = 0, H = 0, S = 0, headDim = 0] = q.shape;
  const kvHeads = k.shape[1]!;
  const rows = (H / kvHeads) * S; // the q heads of a group, one below the other
  const scaled = tf.mul(q, 1 / Math.sqrt(headDim)).reshape([B, kvHeads, rows, headDim]);
  let scores: T = tf.matMul(scaled, k, false, true).reshape([B, H, S, S]);
  if (causal) {
    const position = tf.range(0, S, 1, 'float32');
    const later = indicator(tf.greater(position.reshape([1, S]), position.reshape([S, 1])));
    scores = tf.add(scores, tf.mul(-1e9, later));
  }
  const mixed: T = tf.matMul(tf.softmax(scores).reshape([B, kvHeads, rows, S]), v).reshape([B, H, S, headDim]);
  return mixed.transpose([0, 2, 1, 3]).reshape([B * S, H * headDim]);
}

function targetAttention(target: Target, i: number, h: T<'N d'>, B: number, S: number, linear: Linear): T<'N d'> {
  const { arch } = target;
  const { qkv, nHeads, nKvHeads, names, rotary, eps } = arch;
  const project = (part: keyof Names) => linear(nameOf(arch, part, i), h);
  const first = project('q'); // [N,dQ], or fused [N,3·dQ]: all of q, all of k, all of v, or q, k, v head by head
  const fused = qkv === 'by head' ? first.reshape([B * S, nHeads, -1]) : first;
  const parts = qkv === 'separate' ? [first, project('k'), project('v')] : tf.split(fused, 3, fused.rank - 1);
  let [q, k, v] = parts.map((x, part) => toHeads(x, B, S, part === 0 ? nHeads : nKvHeads)) as [T, T, T];
  const headNorm = (part: 'qNorm' | 'kNorm', x: T) =>
    names[part] ? tf.mul(rmsNormalize(x, eps), weight(target, `${nameOf(arch, part, i)}.weight`)) : x;
  [q, k] = [headNorm('qNorm', q), headNorm('kNorm', k)];
  if (rotary) [q, k] = [rotate(q, rotary), rotate(k, rotary)];
  return linear(nameOf(arch, 'o', i), attend(q, k, v, true));
}

/** The target's logits for tokens (int32), every linear layer of its blocks computed by `linear` (default: its own). */
export function targetForward(target: Target, tokens: T<'B S'>, linear = ownLinear(target)): T<'N vocab'> {
  const { arch, weights } = target;
  const { names, dModel } = arch;
  const [B = 0, S = 0] = tokens.shape;
  let x: T<'N d'> = tf.gather(weight(target, `${names.embed}.weight`), tokens.flatten());
  if (names.positions) {
    const first = tf.slice(weight(target, `${names.positions}.weight`), [0, 0], [S, dModel]);
    x = tf.add(x.reshape([B, S, dModel]), first).reshape([B * S, dModel]);
  }
  const act = ACTIVATIONS[arch.activation];
  for (const i of range(0, arch.nLayers)) {
    const at = (part: keyof Names) => nameOf(arch, part, i);
    const attention = targetAttention(target, i, norm(target, at('norm1'), x), B, S, linear);
    const afterAttention = tf.add(x, attention);
    const h = norm(target, at('norm2'), arch.parallelResidual ? x : afterAttention);
    const up = linear(at('up'), h);
    const hidden = names.gate ? tf.mul(act(linear(at('gate'), h)), up) : act(up);
    x = tf.add(afterAttention, linear(at('down'), hidden));
  }
  const unembed = weights.get(`${names.head}.weight`) ?? weight(target, `${names.embed}.weight`);
  return matmul(norm(target, names.last, x), unembed, true);
}

// ---- D. Data --------------------------------------------------------------------------------------------------------

/** Rows of tokens, all of the same length. */
export type Rows = { readonly count: number; readonly seqLen: number; row(i: number): Int32Array };
const firstRows = (rows: Rows, n: number): Rows => ({ ...rows, count: Math.min(n, rows.count) });

export type Data = { train: Rows; heldOut: Rows; tokenizer: Tokenizer | undefined };

/** Training rows, and the held-out ones: those of `evalData`, else of the last 5 % of the documents. */
export async function loadData({ arch, dir, config: model }: Target, config: Config): Promise<Data> {
  const json = path.join(dir, 'tokenizer.json');
  const repaired = await optional(import('./io/index.ts')); // what the JavaScript library splits otherwise
  const plain = () => new Tokenizer(readJson(json), { clean_up_tokenization_spaces: false });
  const tokenizer = fs.existsSync(json) ? (repaired?.loadTokenizer(dir) ?? plain()) : undefined;
  const first = [model.eos_token_id].flat()[0]; // of a list in some Llamas
  const endOfText = Number.isInteger(first) ? (first as number) : undefined;
  const part = await optional(import('./io/index.ts'));
  if (!part) return { tokenizer, ...plainRows(config, tokenizer, endOfText) };
  const { context, contextField, vocab } = arch;
  const file = path.join(config.out, 'tokens.bin'); // of a corpus larger than memory
  const rows = config.nSteps * config.batchSize;
  const options = { seqLen: config.seqLen, tokenizer, endOfText, vocab, context, contextField, file, rows };
  return { tokenizer, ...(await part.loadRows(config.data, config.evalData, options)) };
}

/** Of a text file, a document a line; other sources and all checks are in io/data.ts. */
function plainRows({ data, evalData, seqLen }: Config, tokenizer?: Tokenizer, endOfText?: number) {
  if (!tokenizer || !data.endsWith('.txt') || evalData)
    refuse(`${data}: without engine/ takes one .txt file, and a model with a tokenizer.json`);
  const lines = orRefuse(data, () => fs.readFileSync(data, 'utf8').split('\n'));
  const documents = lines.filter(line => line.trim());
  // joined and cut; a tokenizer that adds begin-of-text by itself marks the border between documents so
  const mark = endOfText === undefined || tokenizer.encode('').ids.length > 0 ? [] : [endOfText];
  const pack = (texts: string[]): Rows => {
    const tokens = Int32Array.from(texts.flatMap(text => [...tokenizer.encode(text).ids, ...mark]));
    const row = (i: number) => tokens.subarray(i * seqLen, (i + 1) * seqLen);
    return { count: Math.floor(tokens.length / seqLen), seqLen, row };
  };
  const border = Math.floor(0.95 * documents.length);
  const [train, heldOut] = [pack(documents.slice(0, border)), pack(documents.slice(border))];
  return train.count && heldOut.count ? { train, heldOut } : refuse(`${data}: too short for rows of ${seqLen} tokens`);
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
    const order = new Uint32Array(count).map((_, i) => i);
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
export type Module = LinearLayer & { C: number; offset: number };

/** What stays fixed in a run; modules are sorted by path. */
export type Problem = { readonly target: Target; readonly modules: readonly Module[]; readonly config: Config };
export const totalC = (modules: readonly Module[]) => sum(modules.map(m => m.C));

/** Resolves --components: "pattern=C,…", first match wins, * is any text; "auto" takes all with C = max(dIn, dOut). */
export function chooseModules(linears: readonly LinearLayer[], spec: string): Module[] {
  const rules = (spec === 'auto' ? '*=0' : spec).split(',').map(rule => {
    const [, pattern = '', digits = ''] = /^([\w.*]+)=(\d{1,7})$/.exec(rule.trim()) ?? [];
    if (!pattern || (Number(digits) < 1 && spec !== 'auto'))
      refuse(`--components: got ${rule}, takes pattern=C, as in "*.q_proj=64"`);
    const regex = new RegExp(`^${pattern.replaceAll('.', '\\.').replaceAll('*', '.*')}$`);
    if (linears.some(l => regex.test(l.path))) return { regex, C: Number(digits) };
    return refuse(`--components: ${pattern} matches none of ${linears.map(l => l.path).join(', ')}`);
  });
  const modules: Module[] = [];
  for (const layer of [...linears].sort((a, b) => (a.path < b.path ? -1 : 1))) {
    const rule = rules.find(r => r.regex.test(layer.path));
    const C = rule?.C || Math.max(layer.dIn, layer.dOut);
    if (rule) modules.push({ ...layer, C, offset: totalC(modules) });
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
  delta?: T<'N M'>; // mask of the delta components; none: all 0
  route?: T<'N M'>; // 1: the module is computed by its components, 0: by the target's own weight; none: all 1
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
  const s = route ? columns(tf.sub(1, tf.mul(route, tf.sub(1, delta ?? 0)))) : deltas;
  const own = ownLinear(target);
  return (name, x) => {
    const i = index.get(name);
    if (i === undefined) return own(name, x);
    const [m, δ, r] = [masks[i]!, deltas?.[i], routes?.[i]];
    let a: T<'N C'> = δ ? tf.sub(m, δ) : m;
    if (r) a = tf.mul(r, a);
    let y = matmul(tf.mul(matmul(x, V(params, modules[i]!)), a), U(params, modules[i]!));
    if (s) y = tf.add(y, tf.mul(s[i]!, matmul(x, weight(target, name)))); // else s = 0
    return addBias(y, target.weights.get(`${name}.bias`));
  };
}

/** The target's logits [N, vocab] with its decomposed layers masked. */
export function maskedLogits(problem: Problem, params: Tensors, tokens: T<'B S'>, masks: Masks): T<'N vocab'> {
  return targetForward(problem.target, tokens, maskedLinear(problem, params, masks));
}

/** A forward that keeps what enters and what leaves every linear layer. */
export interface TargetPass {
  tokens: T<'B S'>;
  acts: Record<string, T<'N dIn'>>; // pre-weight activation of every linear layer, by path
  outputs: Record<string, T<'N dOut'>>;
  logProbs: T<'N vocab'>;
  probs: T<'N vocab'>;
}
/** The target's own forward, which everything else is measured against (or, with `linear`, a masked one). */
export function targetPass(target: Target, tokens: T<'B S'>, linear = ownLinear(target)): TargetPass {
  const [acts, outputs]: [TargetPass['acts'], TargetPass['outputs']] = [{}, {}];
  const logits = targetForward(target, tokens, (name, x) => {
    acts[name] = x;
    outputs[name] = linear(name, x);
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
  const { ciDModel: d, ciMlpHidden: hidden } = config;
  const shapes: Record<string, number[]> = {};
  const linear = (name: string, dIn: number, dOut: number) =>
    Object.assign(shapes, { [`ci_fn.${name}.weight`]: [dOut, dIn], [`ci_fn.${name}.bias`]: [dOut] });
  linear('proj_in', sum(modules.map(m => m.dIn)), d);
  for (let i = 0; i < config.ciNBlocks; i++) {
    for (const p of 'qkvo') shapes[`ci_fn.blocks.${i}.attn.${p}_proj.weight`] = [d, d];
    linear(`blocks.${i}.mlp.0`, d, hidden);
    linear(`blocks.${i}.mlp.2`, hidden, d);
  }
  linear('proj_out', d, totalC(modules));
  return shapes;
}

/** Logits z [N, ΣC] of causal importance; input: every module's activation, RMS-normed without a scale, side by side. */
export function ciLogits({ config }: Problem, params: Tensors, input: T<'N ΣdIn'>, S: number): T<'N ΣC'> {
  const linear = (name: string, x: T): T =>
    addBias(matmul(x, params[`ci_fn.${name}.weight`]!, true), params[`ci_fn.${name}.bias`]);
  const B = input.shape[0]! / S;
  const headDim = config.ciDModel / config.ciNHeads;
  const frequencies = inverseWavelengths(headDim, config.ciRopeBase);
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

/**
 * The lower-leaky hard sigmoid g = clamp(z, 0, 1), which builds masks (method 2). Its gradient is made by hand: the
 * upstream gradient where 0 < z ≤ 1; α times it where z ≤ 0 and it would push z up, so that a dead component can be
 * revived and is never pushed deeper; 0 elsewhere.
 */
export const lowerLeaky = (z: T<'N ΣC'>, alpha: number): T<'N ΣC'> =>
  tf.customGrad((x, save) => {
    (save as tf.GradSaveFunc)([x as T]);
    const gradFunc = (dy: T, [saved]: T[]) => {
      const inside = indicator(tf.logicalAnd(tf.greater(saved!, 0), tf.lessEqual(saved!, 1)));
      const below = tf.mul(alpha, indicator(tf.lessEqual(saved!, 0)));
      return tf.add(tf.mul(dy, inside), tf.mul(tf.minimum(dy, 0), below));
    };
    return { value: tf.clipByValue(x as T, 0, 1), gradFunc };
  })(z);

/** The upper-leaky hard sigmoid g⁺: clamp(z, 0, 1) up to 1 and 1 + α (z − 1) above; enters the importance loss. */
export const upperLeaky = (z: T<'N ΣC'>, alpha: number): T<'N ΣC'> =>
  tf.add(tf.clipByValue(z, 0, 1), tf.mul(alpha, tf.relu(tf.sub(z, 1))));

/** The target's forward on tokens [B,S], and the importances that the CI function reads off it. */
export function importances(problem: Problem, params: Tensors, tokens: T<'B S'>) {
  const [B = 0, S = 0] = tokens.shape;
  const pass = targetPass(problem.target, tokens);
  const normed = problem.modules.map(m => rmsNormalize(pass.acts[m.path]!, FLOAT32_EPSILON));
  const input = tf.concat(normed, 1); // [N, ΣdIn]
  const z = ciLogits(problem, params, input, S);
  return { pass, input, z, g: lowerLeaky(z, problem.config.leakyAlpha), N: B * S, S };
}

// ---- G. Losses (method 3) -------------------------------------------------------------------------------------------

/** Σ ‖Δ‖² / Σ numel(Δ) over all modules: with everything on, the parts must add up to the target. */
export function faithfulnessLoss({ target, modules }: Problem, params: Tensors): tf.Scalar {
  const delta = (m: Module) => tf.sub(weight(target, m.path), matmul(V(params, m), U(params, m))); // Δᵀ
  const squares = modules.map(m => tf.sum(tf.square(delta(m))));
  const numel = sum(modules.map(m => m.dIn * m.dOut));
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
export type Draws = { u: T<'N ΣC'>; delta: T<'N M'>; route: T<'N M'> };
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
  // m̂ / (√v̂ + ε) = m (√c2 / c1) / (√v + ε √c2): c1 and c2 in factors that are scalars
  const root = tf.sqrt(c2);
  const direction = tf.div(tf.mul(newM, tf.div(root, c1)), tf.add(tf.sqrt(newV), tf.mul(eps, root)));
  return { direction, m: newM, v: newV };
}

/** The sources s [N, ΣC + M] in [0, 1] of one shard of the batch, with the moments of their Adam. */
export type Sources<X extends T = T> = { s: X; m: X; v: X };

/** One ascent step of the adversary, clamped to [0, 1]. */
export function ascend({ s, m, v }: Sources, grad: T, config: Config, lr: T, c1: T, c2: T): Sources {
  const betas = { beta1: config.ppgdBeta1, beta2: config.ppgdBeta2, eps: config.ppgdEps };
  const step = adam(grad, m, v, betas, c1, c2);
  return { s: tf.clipByValue(tf.add(s, tf.mul(lr, step.direction)), 0, 1), m: step.m, v: step.v };
}

// ---- I. Optimisation (method 5) -------------------------------------------------------------------------------------

const MAIN_BETAS = { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

/** From 0 at the first step to 1 at the last. */
const progress = (step: number, nSteps: number): number => (nSteps > 1 ? step / (nSteps - 1) : 0);
/** Cosine from 1 to `finalFrac`. */
export const cosine = (step: number, nSteps: number, finalFrac: number): number =>
  finalFrac + (1 - finalFrac) * 0.5 * (1 + Math.cos(Math.PI * progress(step, nSteps)));
/** What makes up for Adam's moments having started at 0. */
const biasCorrections = (step: number) => ({
  c1: 1 - MAIN_BETAS.beta1 ** (step + 1),
  c2: 1 - MAIN_BETAS.beta2 ** (step + 1),
});

/** Everything that changes with the step by a rule: learning rates, p, and the bias corrections of both Adams. */
export function schedule(config: Config, step: number) {
  const { nSteps, ppgdInnerSteps } = config;
  const warmup = Math.floor(config.ppgdWarmupPct * nSteps);
  const ppgd = step < warmup ? step / warmup : cosine(step - warmup, nSteps - warmup, config.ppgdLrFinalFrac);
  // the adversary's counter t goes up by its inner steps and the one after the main update
  const t = range(1, ppgdInnerSteps + 2).map(k => step * (ppgdInnerSteps + 1) + k);
  return {
    ...biasCorrections(step),
    lrMain: config.mainLr * cosine(step, nSteps, config.mainLrFinalFrac),
    lrPpgd: config.ppgdLr * ppgd,
    p: config.pStart + (config.pEnd - config.pStart) * progress(step, nSteps),
    ppgdC1: t.map(n => 1 - config.ppgdBeta1 ** n),
    ppgdC2: t.map(n => 1 - config.ppgdBeta2 ** n),
  };
}

/** V and U, and the CI function: clipped separately. */
const GROUPS_OF_PARAMS = ['components', 'ci_fn'] as const;
type Group = (typeof GROUPS_OF_PARAMS)[number];
const ofGroup = <X extends T>(params: Record<string, X>, group: Group): X[] =>
  Object.entries(params).flatMap(([name, param]) => (name.startsWith(group) ? [param] : []));
const eachGroup = <X>(make: (group: Group) => X) => ({ components: make('components'), ci_fn: make('ci_fn') });

/** One vector for all of a group: Adam is then a few large ops and not many small ones. */
type Vectors = Record<Group, tf.Variable>;
type Learned = { params: Params; m: Vectors; v: Vectors }; // with Adam's moments
/**
 * What a training step reads and changes: all tf.Variables, so that a traced graph keeps them on the device. Sources are
 * [batchSize·S, ΣC + M]; `summed` are the gradients of a batch's shards so far.
 */
export type State = Learned & { sources: Sources<tf.Variable>; summed: Vectors };

const LOSSES = ['faith', 'imp', 'stoch', 'ppgd'] as const;
const coefficientsOf = (c: Config) => [c.coeffFaith, c.coeffImp, c.coeffStoch, c.coeffPpgd]; // in the same order
type AdamFeeds = Record<'lrMain' | 'c1' | 'c2', T>;
/** The feeds of one step, or of one shard of it: those of the schedule, tokens int32 [B,S] and randomKey's int32 [2]. */
export type StepFeeds = AdamFeeds & Record<'p' | 'lrPpgd' | 'ppgdC1' | 'ppgdC2' | 'tokens' | 'key', T>;
const asTensors = <K extends string>(feeds: Record<K, number | number[]>) =>
  Object.fromEntries(Object.entries<number | number[]>(feeds).map(([k, x]) => [k, tf.tensor(x)])) as Record<K, T>;

/**
 * Losses and gradients of one batch (or shard), and the adversary's moves: `ppgdInnerSteps` before, one after.
 * @returns losses [4] in the order of LOSSES, the gradients of each group side by side in one vector, the sources `after`
 *   it, L0 (mean number of components with g > ciAliveThreshold)
 */
export function lossesAndGradients(problem: Problem, params: Tensors, old: Sources, feeds: StepFeeds, given?: Draws) {
  const { config } = problem;
  const { pass, input, z, g, N, S } = importances(problem, params, feeds.tokens);
  const draws = given ?? stochasticDraws(problem, N, feeds.key);
  const [c1, c2] = [tf.unstack(feeds.ppgdC1), tf.unstack(feeds.ppgdC2)];
  const inner = config.coeffPpgd > 0 ? config.ppgdInnerSteps : 0;

  let sources = old;
  for (let k = 0; k < inner; k++) {
    const [grad] = tf.grads(s => adversarialLoss(problem, params, pass, g, s))([sources.s]);
    sources = ascend(sources, grad!, config, feeds.lrPpgd, c1[k]!, c2[k]!);
  }

  // z is a leaf here: the losses are differentiated down to it, then the CI function, with dz as upstream gradient. TFJS
  // records only what runs inside of `grads`, so the CI function's forward is said twice; a graph merges the two
  const losses = () => {
    const gLower = lowerLeaky(z, config.leakyAlpha);
    return tf.stack([
      faithfulnessLoss(problem, params),
      importanceLoss(upperLeaky(z, config.leakyAlpha), feeds.p, config),
      stochasticLoss(problem, params, pass, gLower, draws),
      adversarialLoss(problem, params, pass, gLower, sources.s),
    ]);
  };
  // total = Σ coefficient × loss, so the coefficients are the upstream gradient of the vector of losses
  const coefficients = tf.tensor1d(coefficientsOf(config));
  const leaves = ofGroup(params, 'components');
  const { value, grads } = tf.valueAndGrads(losses)([...leaves, z, sources.s], coefficients);
  const [dz, dSources] = grads.splice(leaves.length) as [T, T];
  const ciGrads = tf.grads(() => ciLogits(problem, params, input, S))(ofGroup(params, 'ci_fn'), dz);

  // the adversary's third move needs no backward pass of its own: its gradient is in the total's
  const last = () => ascend(sources, tf.div(dSources, config.coeffPpgd), config, feeds.lrPpgd, c1[inner]!, c2[inner]!);
  return {
    losses: value,
    gradients: { components: sideBySide(grads), ci_fn: sideBySide(ciGrads) },
    after: config.coeffPpgd > 0 ? last() : sources,
    l0: tf.div(tf.sum(indicator(tf.greater(g, config.ciAliveThreshold))), N),
  };
}
const sideBySide = (tensors: T[]): T<'n'> => tf.concat(tensors.map(x => x.flatten()));

/** AdamW with weight decay 0: moves a group's parameters and its moments. */
function adamUpdate({ params, m, v }: Learned, group: Group, gradient: T<'n'>, { lrMain, c1, c2 }: AdamFeeds): void {
  const step = adam(gradient, m[group], v[group], MAIN_BETAS, c1, c2);
  const moved = ofGroup(params, group);
  const sizes = moved.map(param => param.size);
  const moves = tf.split(tf.mul(lrMain, step.direction), sizes);
  for (const [i, param] of moved.entries()) param.assign(tf.sub(param, moves[i]!.reshape(param.shape)));
  m[group].assign(step.m);
  v[group].assign(step.v);
}

/** Clips the gradients and moves every parameter. @returns the norms before clipping */
export function applyGradients({ config }: Problem, state: Learned, gradients: Record<Group, T>, feeds: AdamFeeds) {
  const norms = eachGroup(group => tf.sqrt(tf.sum(tf.square(gradients[group]))));
  // a gradient that is not finite moves nothing, so that the parameters can still be looked at when the run stops
  const finite = tf.isFinite(tf.add(norms.components, norms.ci_fn));
  const lrMain = tf.where(finite, feeds.lrMain, tf.scalar(0));
  const limits = { components: config.gradClipComponents, ci_fn: config.gradClipCi };
  for (const group of GROUPS_OF_PARAMS) {
    const scale = tf.minimum(1, tf.div(limits[group], tf.add(norms[group], 1e-6))); // as in torch's clip_grad_norm_
    const clipped = limits[group] > 0 ? tf.mul(gradients[group], scale) : gradients[group];
    adamUpdate(state, group, tf.where(finite, clipped, tf.zerosLike(clipped)), { ...feeds, lrMain });
  }
  return norms;
}

/** What a compiled step returns, in order. */
const STEP_METRICS =
  'loss/faith loss/imp loss/stoch loss/ppgd train/l0 loss/total grad_norm/components grad_norm/ci_fn'.split(' ');

/**
 * Compiles the training step: moves the state on and resolves to STEP_METRICS. With microBatches = R > 1 the batch
 * comes in R shards, one after another; each has its own rows of the sources, and their gradients are averaged.
 */
export function compileStep(engine: Engine, problem: Problem, state: State) {
  const { config } = problem;
  const { sources, summed } = state;
  const R = config.microBatches;
  const n = sources.s.shape[0]! / R; // positions of a shard

  /** One forward and backward, which moves the shard's rows of the sources, and what is done with what it adds up to. */
  const compileShard = (name: string, finish: (values: T, gradients: Record<Group, T>, feeds: StepFeeds) => T) =>
    engine.compile(name, ({ index, before, ...feeds }: StepFeeds & Record<'index' | 'before', T>) => {
      const rows = tf.add(tf.range(0, n, 1, 'int32'), tf.mul(index, tf.scalar(n, 'int32'))) as tf.Tensor1D;
      const mine = (all: tf.Variable): T => (R > 1 ? tf.gather(all, rows) : all);
      const own = { s: mine(sources.s), m: mine(sources.m), v: mine(sources.v) };
      const { losses, l0, gradients, after } = lossesAndGradients(problem, state.params, own, feeds);
      for (const part of ['s', 'm', 'v'] as const) {
        const [all, moved] = [sources[part], after[part]];
        all.assign(R > 1 ? tf.tensorScatterUpdate(all, rows.reshape([n, 1]), moved) : moved);
      }
      const values = tf.add(before, tf.div(tf.concat([losses, l0.reshape([1])]), R));
      const total = R > 1 ? eachGroup(group => tf.add(summed[group], tf.div(gradients[group], R))) : gradients;
      return { values: finish(values, total, feeds) };
    });
  const update = (values: T, gradients: Record<Group, T>, feeds: AdamFeeds): T => {
    const norms = applyGradients(problem, state, gradients, feeds);
    const total = tf.sum(tf.mul(values, [...coefficientsOf(config), 0])); // the last value is L0
    return tf.concat([values, tf.stack([total, norms.components, norms.ci_fn])]);
  };
  const whole = compileShard('step', update);
  const shard = compileShard('shard', (values, gradients) => {
    for (const group of GROUPS_OF_PARAMS) summed[group].assign(gradients[group]);
    return values;
  });
  const finish = engine.compile('update', ({ values, ...feeds }: AdamFeeds & { values: T }) => {
    const done = update(values, summed, feeds);
    for (const gradient of Object.values(summed)) gradient.assign(tf.zerosLike(gradient));
    return { values: done };
  });

  return (step: number, data: Rows): Promise<Float32Array> =>
    tidyAsync(async () => {
      const rows = batchIndices(data.count, config.batchSize, step, config.seed);
      const perShard = rows.length / R;
      const shared = asTensors(schedule(config, step));
      let values: T = tf.zeros([LOSSES.length + 1]); // of the shards so far
      for (let r = 0; r < R; r++) {
        const tokens = tokenBatch(data, rows.slice(r * perShard, (r + 1) * perShard));
        const [key, index] = [randomKey(config.seed, step * R + r), tf.scalar(r, 'int32')];
        const feeds = { ...shared, tokens, key, index, before: values };
        values = (await (R > 1 ? shard : whole)(feeds)).values;
      }
      if (R > 1) values = (await finish({ ...shared, values })).values;
      return numbers(values);
    });
}

/** V ~ N(0, 1/dIn), U ~ N(0, 1/C); the CI function as PyTorch's nn.Linear: uniform ±1/√fan_in, biases too. */
export function initialParams(problem: Problem): Params {
  const { modules, config } = problem;
  const params: Params = {};
  let purpose = PURPOSE.init;
  const draws = (n: number) => uniformArray(n, config.seed, 0, purpose++);
  const normal = (n: number, deviation: number) => {
    const [u, w] = [draws(n), draws(n)]; // Box-Muller
    return u.map((x, i) => deviation * (Math.sqrt(-2 * Math.log(1 - x)) * Math.cos(2 * Math.PI * w[i]!)));
  };
  for (const { path: name, dIn, dOut, C } of modules) {
    params[`components.${name}.V`] = makeVariable(normal(dIn * C, 1 / Math.sqrt(dIn)), [dIn, C]);
    params[`components.${name}.U`] = makeVariable(normal(C * dOut, 1 / Math.sqrt(C)), [C, dOut]);
  }
  const shapes = ciShapes(problem);
  for (const [name, shape] of Object.entries(shapes)) {
    const bound = 1 / Math.sqrt(shapes[name.replace(/bias$/, 'weight')]![1]!);
    const values = draws(sizeOf(shape)).map(u => bound * (2 * u - 1));
    params[name] = makeVariable(values, shape);
  }
  return params;
}

const zeros = (shape: number[]): tf.Variable => tf.tidy(() => tf.variable(tf.zeros(shape), false));
/** The state of step 0: moments 0, sources U(0, 1). */
export function initialState({ modules, config }: Problem, params: Params): State {
  const shape = [config.batchSize * config.seqLen, totalC(modules) + modules.length];
  const s = makeVariable(uniformArray(shape[0]! * shape[1]!, config.seed, 0, PURPOSE.sources), shape);
  const size = (group: Group) => sum(ofGroup(params, group).map(param => param.size));
  return {
    params,
    m: eachGroup(group => zeros([size(group)])),
    v: eachGroup(group => zeros([size(group)])),
    sources: { s, m: zeros(shape), v: zeros(shape) },
    summed: eachGroup(group => zeros([config.microBatches > 1 ? size(group) : 0])),
  };
}

type GoOn = (done: number, loss: number) => Promise<boolean>;
/** Faithfulness warm-up: AdamW on V and U alone, from moments 0, which it leaves at 0; stops when `goOn` says so. */
export async function warmUp(engine: Engine, problem: Problem, state: State, goOn: GoOn): Promise<void> {
  const { faithfulnessWarmupSteps: steps, faithfulnessWarmupLr, faithfulnessWarmupLrFinalFrac } = problem.config;
  const leaves = ofGroup(state.params, 'components');
  const step = engine.compile('warm-up', (feeds: AdamFeeds) => {
    const { value, grads } = tf.valueAndGrads(() => faithfulnessLoss(problem, state.params))(leaves);
    adamUpdate(state, 'components', sideBySide(grads), feeds);
    return { loss: value };
  });
  for (let i = 0; i < steps; i++) {
    const lrMain = faithfulnessWarmupLr * cosine(i, steps, faithfulnessWarmupLrFinalFrac);
    const feeds = () => asTensors({ lrMain, ...biasCorrections(i) });
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

/**
 * Mean KL(target ‖ prediction) once more, for small ones: with d = ln p − ln q it is Σ p d = Σ p (d + e^−d − 1), whose
 * terms are all positive, so float32 sums them without cancellation.
 */
function smallKl({ probs, logProbs }: TargetPass, predicted: T<'N vocab'>): T {
  const d = tf.sub(logProbs, predicted);
  const terms = tf.mul(probs, tf.add(d, tf.sub(tf.exp(tf.neg(d)), 1)));
  return tf.div(tf.sum(terms), probs.shape[0]!);
}

/** Random numbers of the evaluations; `subset`: of StochasticReconSubsetLoss and of the hidden activations. */
export type EvaluationDraws = { stoch: Draws; random: T<'N ΣC'>; subset: Draws };
function evaluationDraws(problem: Problem, N: number, key: T): EvaluationDraws {
  const draws = (i: number) => stochasticDraws(problem, N, tf.add(key, tf.tensor1d([0, i], 'int32')));
  return { stoch: draws(0), subset: draws(1), random: uniform([N, totalC(problem.modules)], key, PURPOSE.randomMask) };
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
  const scalars: Tensors = {
    'ce_kl/ce_target': crossEntropy(pass.logProbs, tokens),
    'loss/FaithfulnessLoss': faithfulnessLoss(problem, params),
    'loss/ImportanceMinimalityLoss': importanceLoss(upperLeaky(z, config.leakyAlpha), p, config, 1),
    'loss/StochasticReconSubsetLoss': stochasticLoss(problem, params, pass, g, draws.subset),
  };
  for (const [name, masks] of Object.entries(strategies)) {
    const predicted = tf.logSoftmax(maskedLogits(problem, params, tokens, masks));
    scalars[`ce_kl/kl_${name}`] = smallKl(pass, predicted);
    // of the differences, not a difference of two nearly equal means
    scalars[`ce_kl/ce_difference_${name}`] = crossEntropy(tf.sub(predicted, pass.logProbs), tokens);
  }
  const active = tf.mean(indicator(tf.greater(g, config.ciAliveThreshold)), 0); // [ΣC]
  return { ...scalars, active, meanCi: tf.mean(g, 0) };
}

/** KL when the components are deleted (mask 0, delta 0) whose `mask` [1, ΣC] is 0, and all others stay on. */
export const klAlive = (problem: Problem, params: Tensors, tokens: T<'B S'>, mask: T) =>
  smallKl(targetPass(problem.target, tokens), tf.logSoftmax(maskedLogits(problem, params, tokens, { mask })));

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
    const { outputs } = targetPass(problem.target, tokens, maskedLinear(problem, params, masks));
    return tf.stack(problem.modules.map(m => tf.mean(tf.squaredDifference(outputs[m.path]!, pass.outputs[m.path]!))));
  };
  return { CI: errors({ mask: g }), Stochastic: errors({ mask: interpolate(g, draws.u), delta: draws.delta }) };
}

/** `meanCi`: mean g of every component over the rows [ΣC]. */
export type Evaluation = { metrics: Metrics; meanCi: Float64Array };

/** Compiles the evaluations; the result evaluates the parameters as they are then, averaged over batches of rows. */
export function compileEvaluation(engine: Engine, problem: Problem, params: Params) {
  const { modules, config } = problem;
  const [sumC, sumOut] = [totalC(modules), sum(modules.map(m => m.dOut))];
  type Feeds<K extends string> = Record<'tokens' | K, T>;
  const draws = (f: Feeds<'key'>) => evaluationDraws(problem, f.tokens.size, f.key);
  const masks = engine.compile('evaluate', (f: Feeds<'key' | 'p'>) =>
    evaluateMasks(problem, params, f.tokens, f.p, draws(f)),
  );
  const pgd = engine.compile('pgd', (f: Feeds<'source'>) => pgdStep(problem, params, f.tokens, f.source));
  const hidden = engine.compile('hidden acts', (f: Feeds<'key'>) =>
    hiddenActsErrors(problem, params, f.tokens, draws(f).subset),
  );
  const alive = engine.compile('alive', (f: Feeds<'mask'>) => ({ kl: klAlive(problem, params, f.tokens, f.mask) }));

  const evaluate = async (rows: Rows, step: number, slow: boolean): Promise<Evaluation> => {
    const p = tf.scalar(schedule(config, Math.min(step, config.nSteps - 1)).p);
    const means: Record<string, Float64Array> = {}; // over the rows, by name
    const add = async (share: number, outputs: Tensors) => {
      for (const [name, output] of Object.entries(outputs)) {
        const values = await numbers(output);
        means[name] ??= new Float64Array(values.length);
        for (let i = 0; i < values.length; i++) means[name][i]! += share * values[i]!;
      }
    };
    const batches = inBatches(rows.count, config.evalBatchSize).map((indices, b) => {
      const key = randomKey(config.seed ^ 0x5eed, 2 * b);
      return { tokens: tokenBatch(rows, indices), key, share: indices.length / rows.count };
    });
    for (const { tokens, key, share } of batches) {
      await add(share, await masks({ tokens, key, p }));
      let source = tf.tidy(() => uniform([1, sumC + modules.length], key, PURPOSE.pgd));
      for (let i = 0; i < config.pgdEvalNSteps; i++) source = (await pgd({ tokens, source })).next;
      await add(share, { 'loss/PGDReconLoss': (await pgd({ tokens, source })).kl });
      if (slow) await add(share, await hidden({ tokens, key }));
    }
    const { meanCi, active, CI, Stochastic } = means as Record<string, Float64Array> & { meanCi: Float64Array };
    const isAlive = Float32Array.from(meanCi, ci => Number(ci >= DEAD_BELOW));
    const mask = tf.tensor2d(isAlive, [1, sumC]);
    for (const { tokens, share } of batches) await add(share, { 'ce_kl/kl_alive': (await alive({ tokens, mask })).kl });

    const metrics: Metrics = { 'eval/n_alive': sum(isAlive) };
    for (const [name, mean] of Object.entries(means)) if (name.includes('/')) metrics[`eval/${name}`] = mean[0]!;
    const ofZero = metrics['eval/ce_kl/ce_difference_zero_masked']!;
    for (const [name, difference] of Object.entries(metrics)) {
      if (name.includes('ce_difference')) metrics[name.replace('difference', 'unrecovered')] = difference / ofZero;
    }
    const threshold = config.ciAliveThreshold; // as Python writes a float
    const l0 = `eval/l0/${Number.isInteger(threshold) ? threshold.toFixed(1) : threshold}`;
    metrics[`${l0}_total`] = sum(active!);
    for (const m of modules) metrics[`${l0}_${m.path}`] = sum(active!.subarray(m.offset, m.offset + m.C));
    for (const [kind, errors] of slow ? Object.entries({ CI, Stochastic }) : []) {
      const loss = `eval/loss/${kind}HiddenActsReconLoss`;
      for (const [i, m] of modules.entries()) metrics[`${loss}/${m.path}`] = errors![i]!;
      metrics[`${loss}/total`] = sum(modules.map((m, i) => (errors![i]! * m.dOut) / sumOut));
    }
    return { metrics, meanCi };
  };
  return (rows: Rows, step: number, slow: boolean) => tidyAsync(() => evaluate(rows, step, slow));
}

// ---- K. The run -----------------------------------------------------------------------------------------------------
// The run folder holds config.json, metrics.jsonl, and a checkpoint: components.safetensors, the deliverable, with the
// state.safetensors that --resume needs. io/checkpoints.ts saves the two so that a save cut off anywhere leaves a whole
// pair, restores them, listens to signals and says how far a loop is.

/** What there is of it without engine/: lines now and then, and at the end the deliverable alone. */
const plainRuns = {
  startProgress: (total: number) => (done: number, line: () => string) => {
    if (done === total || Number.isInteger(Math.log2(done))) talk(line());
  },
  watchSignals: () => ({ interrupted: async () => undefined, stop: () => {} }),
  async checkFinite(step: number, metrics: Metrics): Promise<void> {
    if (!Object.values(metrics).every(Number.isFinite)) throw new Error(`diverged at step ${step}`);
  },
  async saveCheckpoint(dir: string, _step: number, components: Params): Promise<void> {
    const header: Record<string, object> = {};
    const data: Buffer[] = [];
    let end = 0;
    for (const [name, variable] of Object.entries(components)) {
      header[name] = { dtype: 'F32', shape: variable.shape, data_offsets: [end, end + 4 * variable.size] };
      data.push(Buffer.from(Float32Array.from(await numbers(variable)).buffer));
      end += 4 * variable.size;
    }
    const start = Buffer.from(`${' '.repeat(8)}${JSON.stringify(header)}`);
    start.writeBigUInt64LE(BigInt(start.length - 8));
    fs.writeFileSync(path.join(dir, 'components.safetensors'), Buffer.concat([start, ...data]));
  },
};
const longRuns = async () => (await optional(import('./io/index.ts'))) ?? plainRuns;

/** What --resume needs besides the parameters, by the names in state.safetensors. */
const stateVariables = ({ m, v, sources }: State): Params => {
  const parts = Object.entries({ 'adam.m': m, 'adam.v': v, ppgd: sources });
  const named = parts.flatMap(([part, of]) => Object.entries(of).map(([name, x]) => [`${part}.${name}`, x]));
  return Object.fromEntries(named);
};

/** Writes beside and renames, so that nobody ever reads half a file. */
function writeAtomic(file: string, content: string): void {
  fs.writeFileSync(`${file}.tmp-${process.pid}`, content);
  fs.renameSync(`${file}.tmp-${process.pid}`, file);
}

/** What config.json holds. */
type RunRecord = ReturnType<typeof runRecord>;
const VERSION = '0.1.0';

function runRecord({ target, modules, config }: Problem, { train, heldOut }: Data, engine: Engine) {
  const ofRows = crypto.createHash('sha256');
  for (let i = 0; i < train.count; i++) ofRows.update(train.row(i));
  return {
    formatVersion: 1,
    config,
    model: { path: config.model, type: target.arch.type, sha256: target.sha256 },
    data: { path: config.data, sha256: ofRows.digest('hex'), trainRows: train.count, heldOutRows: heldOut.count },
    modules: Object.fromEntries(modules.map(({ path: name, dIn, dOut, C }) => [name, { dIn, dOut, C }])),
    engine: { name: engine.name, description: engine.description },
    versions: { 'nano-param-decomp': VERSION, node: process.versions.node, tfjs: tf.version.tfjs },
    command: process.argv.slice(2),
  };
}

// What a resumed run may change: nothing that the training's numbers depend on (model and data are compared by content) …
const NOT_TRAINING = ['logEvery', 'saveEvery', 'harvest', 'harvestRows', ...Object.keys(GROUPS.Evaluation)];
export const MAY_CHANGE = Object.keys(FIELDS).filter(name => FIELDS[name]!.place || NOT_TRAINING.includes(name));
// … and what changes only how they are rounded, or which random numbers are drawn: with a warning.
export const CHANGES_BITS = Object.keys(GROUPS.Engine);

/** What the jobs work on. */
export type Job = { engine: Engine; problem: Problem; params: Params; data: Data };
/**
 * The training loop: warm up, step, log, evaluate, save, until the last step or a signal.
 * @returns the last evaluation, or the signal's exit code if there was one
 */
async function train({ engine, problem, params, data }: Job, resume: boolean): Promise<Metrics | number> {
  const { config: c } = problem;
  const state = initialState(problem, params);
  const runs = await longRuns();
  const saved = async () => (await import('./io/index.ts')).resume(c.out, params, stateVariables(state), talk);
  const start = (resume && (await saved())) || 0;
  const signals = runs.watchSignals(talk);
  let [interrupted, evaluated]: [number | undefined, Metrics | undefined] = [undefined, undefined];
  const evaluateRows = compileEvaluation(engine, problem, params);
  const evaluate = (step: number, slow: boolean) => evaluateRows(firstRows(data.heldOut, c.evalBatchSize), step, slow);

  const showWarmUp = runs.startProgress(c.faithfulnessWarmupSteps);
  const afterWarmUpStep = async (done: number, loss: number) => {
    showWarmUp(done, () => `warm-up ${done}/${c.faithfulnessWarmupSteps}  faithfulness ${loss.toExponential(2)}`);
    await runs.checkFinite(done, { 'warm-up loss/faith': loss }, params);
    interrupted = await signals.interrupted(); // there is nothing to save yet: --resume begins again
    return interrupted === undefined;
  };
  if (start === 0) await warmUp(engine, problem, state, afterWarmUpStep);

  const log = (step: number, metrics: Metrics) =>
    fs.appendFileSync(path.join(c.out, 'metrics.jsonl'), `${JSON.stringify({ step, ...metrics })}\n`);
  const step = compileStep(engine, problem, state);
  const show = runs.startProgress(c.nSteps, start);
  for (let n = start; n < c.nSteps && interrupted === undefined; n++) {
    const started = performance.now();
    const values = await step(n, data.train);
    const metrics: Metrics = Object.fromEntries(STEP_METRICS.map((name, i) => [name, values[i]!]));
    const done = n + 1;
    const due = (every: number) => done === c.nSteps || (every > 0 && done % every === 0);
    await runs.checkFinite(done, metrics, params);
    const losses = () => LOSSES.map(l => `${l} ${metrics[`loss/${l}`]!.toPrecision(3)}`).join('  ');
    show(done, () => `step ${done}/${c.nSteps}  ${losses()}  L0 ${metrics['train/l0']!.toFixed(1)}`);
    if (due(c.logEvery)) {
      const { lrMain, lrPpgd, p } = schedule(c, n);
      const { numTensors, numBytes } = tf.memory();
      const rates = { 'lr/main': lrMain, 'lr/ppgd': lrPpgd, p, 'time/ms_per_step': performance.now() - started };
      log(done, { ...metrics, ...rates, 'memory/tensors': numTensors, 'memory/bytes': numBytes });
    }
    if (due(c.evalFreq)) {
      // before the save: what a resumed run finds in metrics.jsonl up to its step is then complete
      evaluated = (await evaluate(done, due(c.slowEvalFreq))).metrics;
      log(done, evaluated);
    }
    interrupted = await signals.interrupted();
    if (due(c.saveEvery) || interrupted !== undefined)
      await runs.saveCheckpoint(c.out, done, params, stateVariables(state));
  }
  signals.stop();
  // a run that was complete already and is resumed has nothing evaluated yet
  return interrupted ?? evaluated ?? (await evaluate(c.nSteps, true)).metrics;
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
    positions: 0,
    pairPositions: 0,
    inputTotal: new Float64Array(vocabSize),
    tallies: [],
    ciSum: new Float64Array(columns),
    slotOf: new Int32Array(columns).fill(-1),
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
    formatVersion: 1,
    positions: counts.positions,
    pairPositions: counts.pairPositions,
    outputTokens: covered,
    settings,
    modules: modules.map(({ path, offset, C }) => ({
      path,
      offset,
      C,
      alive: components.filter(c => c.module === path).length,
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
    column,
    slot,
    firings: 0,
    activationSum: 0,
    missed: 0,
    top: [],
    random: [],
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
      module: path,
      index: column - offset,
      column,
      firings,
      density: round(firings / positions),
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
    if (Math.abs(pmi) < 1e-4) continue; // no more than the rounding of sums in float32
    const stat: TokenStat = [token, round(count), count > 0 ? round(pmi) : null];
    if (pmi > 0) insert(top, listLength, pmi, stat);
    else insert(bottom, listLength, -pmi, stat);
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
export async function scoreRules({ engine, problem, params, data }: Job, { rules, labels }: Labels) {
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
  const tokens = tokenBatch(data.heldOut, range(0, labels.length));
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
          return sum(chosen) / Math.max(1, chosen.length);
        };
        return { c, klInForce: mean(true), klElsewhere: mean(false) };
      }),
    );
    const { c, klInForce, klElsewhere } = deletions.sort((a, b) => b.klInForce - a.klInForce)[0]!;
    const m = modules.find(({ offset, C }) => c < offset + C)!;
    scores.push({
      ...rule,
      support: support[r]!,
      component: { module: m.path, index: c - m.offset },
      f1: f1(c),
      precision: both[r]![c]! / Math.max(1, firings[c]!),
      recall: both[r]![c]! / Math.max(1, support[r]!),
      klInForce,
      klElsewhere,
      causal: klInForce > 0.1 && klElsewhere < klInForce / 10,
    });
  }
  const meanF1 = sum(scores.map(s => s.f1)) / scores.length;
  const count = (wanted: (s: RuleScore) => boolean) => scores.filter(wanted).length;
  return { rules: scores, meanF1, nF1AtLeast80: count(s => s.f1 >= 0.8), nCausal: count(s => s.causal) };
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
async function harvestRun({ engine, problem, params, data }: Job, scoreboard: Scoreboard | undefined) {
  const { target, modules, config } = problem;
  const rows = firstRows(data.train, config.harvestRows || data.train.count);
  const runs = await longRuns();
  const show = runs.startProgress(rows.count * rows.seqLen, 0, 'token');
  const result = await harvest({
    pass: harvestPass(problem, params),
    engine,
    modules: [...modules],
    vocabSize: target.arch.vocab,
    rows,
    tokenText: id => tokenText(data.tokenizer, id),
    passages: range(0, Math.min(8, Math.ceil(1024 / rows.seqLen), data.heldOut.count)).map(data.heldOut.row),
    settings: { seed: config.seed },
    progress: positions => show(positions, () => `harvest ${positions} tokens`),
  });
  writeAtomic(path.join(config.out, 'harvest.json'), JSON.stringify(result));
  const [page, more] = [await optional(import('./postprocess/page.ts')), await optional(import('./io/index.ts'))];
  if (!page || !more) return talk('no page: that takes the folders assets/ and engine/');
  const history = more.readMetrics(path.join(config.out, 'metrics.jsonl'));
  const record = readJson(path.join(config.out, 'config.json'));
  const metrics = history.findLast(line => 'eval/ce_kl/ce_target' in line) ?? {};
  const shown = { config: record, metrics, history, harvest: result, ...(scoreboard && { scoreboard }) };
  writeAtomic(path.join(config.out, 'report.html'), page.renderReport(shown));
}

/** A token as text, with its leading space; #id without a tokenizer. */
export function tokenText(tokenizer: Tokenizer | undefined, id: number): string {
  const token = tokenizer?.id_to_token(id);
  if (tokenizer === undefined || token === undefined) return `#${id}`;
  if (token.includes('▁')) return token.replaceAll('▁', ' ');
  return tokenizer.decode([id], { skip_special_tokens: false }) || token;
}

// ---- M. Command line ------------------------------------------------------------------------------------------------
// Exit codes: 0, 1 failed, 2 bad input, 130 or 143 interrupted.

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

const LOSS_TOKENS = 8192; // over which the target's own loss is averaged, where there are so many
/** What every job starts with: engine, target, data, modules; last the target's own loss: a wrongly loaded model shows. */
async function open(config: Config, given: ReadonlySet<string>, preset?: Preset) {
  if (!config.model) refuse('--model: missing; takes a Hugging Face folder or a hub id (or give a --preset)');
  if (!config.data) refuse('--data: missing; takes a .txt, .jsonl or .json file');
  const engine = await startEngine(config);
  talk(`engine   ${engine.description}`);
  const hub = await optional(import('./io/index.ts')); // an id becomes the folder of its snapshot
  const target = await loadTarget((await hub?.resolveModel(config.model)) ?? config.model);
  const { arch, linears } = target;
  const { type, nLayers, dModel, vocab } = arch;
  talk(`target   ${config.model}: ${type}, ${nLayers} layers, width ${dModel}, vocabulary ${vocab}`);
  for (const [field, meant] of Object.entries(preset?.target ?? {})) {
    const got = arch[field as keyof Architecture];
    if (got !== meant) talk(`warning  this preset is meant for a target with ${field} ${meant}; this one has ${got}`);
  }
  const c = resolveConfig(config, arch, given, engine.gpu);
  const data = await loadData(target, c);
  c.seqLen = data.train.seqLen;
  const rowsOf = ({ count, seqLen }: Rows) => `${count} rows of ${seqLen} tokens`;
  talk(`data     ${rowsOf(data.train)} to train on, ${rowsOf(data.heldOut)} held out`);
  const problem: Problem = { target, modules: chooseModules(linears, c.components), config: c };
  talk(`modules  ${problem.modules.length} of ${linears.length} linear layers, ${totalC(problem.modules)} components`);
  const rows = firstRows(data.heldOut, Math.max(c.evalBatchSize, Math.ceil(LOSS_TOKENS / c.seqLen)));
  let loss = 0;
  for (const indices of inBatches(rows.count, c.evalBatchSize)) {
    const tokens = tokenBatch(rows, indices);
    const ofBatch = tf.tidy(() => crossEntropy(targetPass(target, tokens).logProbs, tokens));
    loss += ((await numbers(ofBatch))[0]! * indices.length) / rows.count;
    tf.dispose([tokens, ofBatch]);
  }
  talk(`loss     ${loss.toFixed(4)} nats per token, the target's own on ${rows.count} held-out rows`);
  return { engine, problem, data };
}

/** Says what a training step will take, before anything is allocated, and refuses what can't fit. */
function checkSize({ target, modules, config }: Problem, engine: Engine): void {
  const { vocab, dModel } = target.arch;
  const { ciDModel, ciNBlocks, ciMlpHidden, ciNHeads, seqLen, batchSize, microBatches: R } = config;
  const [sumC, N] = [totalC(modules), batchSize * seqLen];
  const targetParams = sum([...target.weights.values()].map(w => w.size));
  const decomposed = sum(modules.map(m => m.dIn * m.dOut));
  const components = sum(modules.map(m => m.C * (m.dIn + m.dOut)));
  const ciFn = sum(Object.values(ciShapes({ target, modules, config })).map(sizeOf));
  const params = components + ciFn;
  const state = targetParams + params * (R > 1 ? 4 : 3) + 3 * N * (sumC + modules.length);
  const ciActs = ciNBlocks * (16 * ciDModel + 5 * ciMlpHidden + 4 * ciNHeads * seqLen);
  const acts = 40 * sumC + 12 * vocab + 40 * sum(modules.map(m => m.dIn + m.dOut)) + ciActs; // a position's
  // forward 1, backward to the masks 1, to V and U 1 more: each inner step takes 2, each of two losses 3
  const passes = 2 * (config.ppgdInnerSteps + 2) + 1;
  const perPosition = components * (passes + 1) + (decomposed + dModel * vocab) * passes + 3 * ciFn;
  const flops = 2 * N * perPosition + 6 * sum(modules.map(m => m.dIn * m.dOut * m.C));
  const bytes = 4 * (state + (N / R) * acts + 3 * params);
  const M = (x: number) => `${(x / 1e6).toFixed(2)}M`;
  const GiB = (x: number) => `${(x / 2 ** 30).toFixed(2)} GiB`;
  talk(`size     target ${M(targetParams)} parameters, V and U ${M(components)}, CI function ${M(ciFn)}`);
  talk(`step     about ${GiB(bytes)} of memory, ${(flops / 1e9).toFixed(1)} GFLOP`);
  const there = engine.memoryBytes?.() ?? Infinity;
  if (bytes <= there) return;
  const split = batchSize > R && `a larger --micro-batches than ${R}`;
  const advice = `${split || 'a smaller --seq-len or fewer --components'}, or a smaller --batch-size`;
  refuse(`a step takes about ${GiB(bytes)} and there are ${GiB(there)}: try ${advice}`);
}

/** --dry-run: lists the modules, times some steps, writes nothing. */
async function measureSteps(engine: Engine, problem: Problem, { train }: Data): Promise<number> {
  for (const { path: name, dIn, dOut, C } of problem.modules) console.log(`${name}  [${dOut}, ${dIn}]  C ${C}`);
  const step = compileStep(engine, problem, initialState(problem, initialParams(problem)));
  const times: number[] = [];
  for (let n = 0; n < 7; n++) {
    const started = performance.now();
    await step(n, train);
    if (n >= 2) times.push(performance.now() - started); // the first two are traced and checked
  }
  const [typical, { nSteps }] = [times.sort((a, b) => a - b)[2]!, problem.config];
  const hours = ((typical * nSteps) / 3.6e6).toFixed(2);
  console.log(`${typical.toFixed(1)} ms per step: ${nSteps} steps take ${hours} hours`);
  return 0;
}

/** The main job: warm up, train, evaluate, save, score, harvest, report; `old`: the run to go on with. */
async function decompose(config: Config, given: Set<string>, dryRun: boolean, preset?: Preset, old?: RunRecord) {
  const { engine, problem, data } = await open(config, given, preset);
  const { config: c } = problem;
  checkSize(problem, engine);
  if (dryRun) return measureSteps(engine, problem, data);
  const labels = c.labels ? readLabels(c.labels, data.heldOut) : undefined;
  const record = runRecord(problem, data, engine);
  if (old) (await import('./io/index.ts')).compareRuns(old, record, MAY_CHANGE, CHANGES_BITS, talk);
  fs.mkdirSync(c.out, { recursive: true });
  writeAtomic(path.join(c.out, 'config.json'), `${JSON.stringify(record, null, 1)}\n`);
  const job = { engine, problem, params: initialParams(problem), data };
  const metrics = await train(job, old !== undefined);
  if (typeof metrics === 'number') {
    talk(`stopped; go on with --resume --out ${c.out}`);
    return metrics; // the exit code
  }
  const board = labels && (await tidyAsync(() => scoreRules(job, labels)));
  const report = await optional(import('./postprocess/page.ts'));
  const sizes = { components: totalC(problem.modules), pgdSteps: c.pgdEvalNSteps };
  console.log(report?.summary(metrics, sizes, board) ?? metrics);
  if (c.harvest) await harvestRun(job, board);
  const peak = (process.resourceUsage().maxRSS / 2 ** 20).toFixed(2);
  console.log(`\nRun folder: ${c.out}   peak memory: ${peak} GiB`);
  return 0;
}

/** The config.json of a run. @throws UsageError if it is none */
function readRun(dir: string): RunRecord {
  const record = readJson(path.join(dir, 'config.json')) as unknown as RunRecord;
  return record.formatVersion === 1 ? record : refuse(`${dir}: config.json is not of a run with formatVersion 1`);
}

/** A finished run: its target, parameters, data, engine and config. @throws UsageError if the model is another one */
export async function openRun(dir: string, changes: Partial<Config> = {}): Promise<Job & { record: RunRecord }> {
  const record = readRun(dir);
  const config = { ...DEFAULTS, ...record.config, ...changes, out: dir };
  const { engine, problem, data } = await open(config, new Set(Object.keys(config)));
  if (problem.target.sha256 !== record.model.sha256)
    refuse(`${record.model.path}: not the model of this run (its SHA-256 differs)`);
  const params = initialParams(problem);
  const { restore } = await import('./io/index.ts');
  await restore(path.join(dir, 'components.safetensors'), params);
  return { engine, problem, params, data, record };
}

/** eval and harvest: opens a finished run again with its own config. */
async function revisit(command: string, dir: string, changes: Partial<Config>): Promise<number> {
  const job = await openRun(dir, changes);
  const { engine, problem, data } = job;
  const { config } = problem;
  if (command === 'harvest') {
    const labels = config.labels && !changes.evalData ? readLabels(config.labels, data.heldOut) : undefined;
    await harvestRun(job, labels && (await scoreRules(job, labels)));
    return 0;
  }
  // given rows are one batch, since the importance loss is no mean over batches; --eval-batch-size splits them
  if (changes.evalData && !changes.evalBatchSize) problem.config.evalBatchSize = data.heldOut.count;
  const rows = changes.evalData ? data.heldOut : firstRows(data.heldOut, problem.config.evalBatchSize);
  const evaluation = await compileEvaluation(engine, problem, job.params)(rows, config.nSteps, true);
  console.log(JSON.stringify(evaluation.metrics));
  return 0;
}

const presetLines = Object.entries(PRESETS).map(([name, { source }]) => `  ${name.padEnd(17)} ${source}\n`);
const usage = `nano-param-decomp ${VERSION}: takes a trained language model apart into rank-one subcomponents

  npx tsx nano-param-decomp.ts [decompose] --model M --data D [--preset P] [flags]
  npx tsx nano-param-decomp.ts [decompose] --resume --out DIR     goes on exactly where DIR stopped
  npx tsx nano-param-decomp.ts [decompose] … --dry-run            checks, estimates and times a step, writes nothing
  npx tsx nano-param-decomp.ts eval --run DIR [--eval-data rows.json]
  npx tsx nano-param-decomp.ts harvest --run DIR [--data D]       (re)builds harvest.json and report.html

Presets (--preset):
${presetLines.join('')}`;

/** The flags of each command besides the config's fields. */
const ALWAYS = { help: 'boolean', version: 'boolean' } as const;
const OWN_FLAGS = {
  decompose: { preset: 'string', resume: 'boolean', 'dry-run': 'boolean', ...ALWAYS },
  eval: { run: 'string', ...ALWAYS },
  harvest: { run: 'string', ...ALWAYS },
} as const;

/** Flags as --name=value, for want of io/flags.ts, which takes every form, checks values and writes --help. */
function plainFlags(own: object, args: string[]) {
  const flags: Record<string, string | boolean | undefined> = {};
  const values: Record<string, Value> = {};
  for (const arg of args) {
    const [, no, flag = '', raw] = /^--(no-)?([\w-]+)(?:=(.+))?$/s.exec(arg) ?? [];
    const name = flag.replace(/-(.)/g, (_, letter) => letter.toUpperCase());
    const field = Object.hasOwn(FIELDS, name) ? FIELDS[name]! : undefined;
    const value = typeof field?.value === 'number' ? Number(raw ?? Number.NaN) : no ? false : raw;
    const inRange = typeof value !== 'number' || (value >= field!.min! && value <= field!.max!);
    if (Object.hasOwn(own, flag)) flags[flag] = raw ?? true;
    else if (value !== undefined && typeof value === typeof field?.value && inRange) values[name] = value;
    else refuse(`${arg}: without engine/ takes --name=value (--help lists the names)`);
  }
  return { values, flags };
}

/** Parses and runs a command line. @returns the exit code */
export async function main(argv: string[]): Promise<number> {
  const named = Object.hasOwn(OWN_FLAGS, argv[0] ?? '');
  const command = named ? (argv[0] as keyof typeof OWN_FLAGS) : 'decompose';
  const [own, args] = [OWN_FLAGS[command], named ? argv.slice(1) : argv];
  const cli = await optional(import('./io/index.ts'));
  const alone = !cli && (command !== 'decompose' || args.includes('--resume'));
  if (alone) refuse('--resume, eval and harvest need the folder engine/');
  const { values, flags } = cli ? cli.parseFlags(FIELDS, own, args) : plainFlags(own, args);
  const help = () => `${usage}${cli?.helpLines(GROUPS) ?? `Without engine/ as --name=value: ${Object.keys(FIELDS)}`}\n`;
  if (flags.help || flags.version) {
    console.log(flags.help ? help() : VERSION);
    return 0;
  }
  const changes: Partial<Config> = values;
  if (command !== 'decompose') {
    if (typeof flags.run !== 'string') return refuse(`${command}: takes --run DIR, the folder of a finished run`);
    return revisit(command, flags.run, changes);
  }
  const dryRun = flags['dry-run'] === true;
  if (flags.resume) {
    if (!changes.out) return refuse('--resume: takes --out DIR, the folder of the run to go on with');
    const record = readRun(changes.out);
    const config = { ...DEFAULTS, ...record.config, ...changes };
    return decompose(config, new Set(Object.keys(config)), dryRun, undefined, record);
  }
  const name = flags.preset as string | undefined;
  if (name !== undefined && !Object.hasOwn(PRESETS, name))
    refuse(`--preset: got ${name}, takes one of ${Object.keys(PRESETS).join(', ')}`);
  const preset = PRESETS[name ?? ''];
  const config: Config = { ...DEFAULTS, ...preset?.config, ...changes };
  const stamp = new Date().toISOString().slice(0, 19).replace(/\D/g, '-');
  config.out ||= path.join('runs', `${path.basename(config.model) || 'run'}-${stamp}`);
  if (fs.existsSync(path.join(config.out, 'config.json')))
    refuse(`${config.out}: holds a run; --resume goes on with it, or take another --out`);
  const given = new Set([...Object.keys(preset?.config ?? {}), ...Object.keys(changes)]);
  return decompose(config, given, dryRun, preset);
}

if (process.argv[1] && fs.realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const failed = (error: NodeJS.ErrnoException): number => {
    const usage = error.name === 'UsageError';
    // what the system says (a full disk …) is no bug of ours: its stack tells nothing
    const known = usage || error.name === 'DivergenceError' || /^E[A-Z]+$/.test(error.code ?? '');
    talk(known ? `nano-param-decomp: ${error.message}` : String(error.stack));
    return usage ? 2 : 1;
  };
  const exit = (code: number) => Object.assign(process, { exitCode: code });
  main(process.argv.slice(2)).catch(failed).then(exit);
}
