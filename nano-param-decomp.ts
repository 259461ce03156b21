/**
 * nano-param-decomp: VPD (adVersarial Parameter Decomposition) of a trained network, in one file.
 *
 * VPD writes every weight matrix of a trained network as a sum of rank-one subcomponents, and a
 * small transformer, the causal-importance (CI) function, learns which few of them each token
 * really needs. What it calls unimportant may be removed, at random or by an adversary, and the
 * network must still give the same answer. What is left are small mechanisms.
 *
 *   npm install && npm start                         the bundled toy: decompose, evaluate, page
 *   npx tsx nano-param-decomp.ts --model M --data D  a Hugging Face folder or hub id, a text file
 *   npx tsx nano-param-decomp.ts --help              every field of the config is a flag
 *
 * The paper: "Interpreting Language Model Parameters", Goodfire, May 2026. The original, in
 * PyTorch: github.com/goodfire-ai/param-decomp. The predecessor, SPD: arxiv.org/abs/2506.20790.
 *
 * Contents; README.md has the formulas in one page, under the same letters
 *   A. Config            one record: type, default, flag, help
 *   B. Components        V, U, the masked forward
 *   C. CI function       the causal-importance transformer, leaky sigmoids
 *   D. Losses            faithfulness, importance, two reconstructions
 *   E. The adversary     persistent PGD: its sources, its Adam, its moves
 *   F. The step          one training step in five parts; Adam, schedules, initial values
 *   G. Evaluation        the original's metrics, and ours
 *   H. The run           the training loop and its folder
 *   I. Harvest           what each component does, the short version
 *   ---- below: what this stands on ----
 *   J. Language models   one decoder for all of them, and its loading
 *   K. Data              rows, batches, random numbers
 *   L. Rooms             engine/ and io/, and plain ways to do without
 *   M. Command line      decompose; jobs on finished runs are in postprocess/
 *
 * Symbols, with their shapes and the original's names
 *   N = B·S positions    B rows of S tokens; activations are matrices [N, ·]
 *   V [dIn,C], U [C,dOut], Δ [dOut,dIn]    a module's C components (V, U) and weight_delta
 *   ΣC, M                the components of all M modules side by side, modules sorted by path
 *   z, g, g⁺ [N,ΣC]      ci_pre_sigmoid, ci_lower, ci_upper
 *   m [N,ΣC], δ [N,M], r [N,M]    component mask, weight_delta_mask, routing mask
 *   s [N,ΣC+M]           the adversary's sources;  R  micro-batches (the original's world_size)
 */
import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as path from 'node:path';
import { fileURLToPath } from 'node:url';
import { Tokenizer } from '@huggingface/tokenizers';
import * as tf from '@tensorflow/tfjs';

/** A tensor. T<'N dIn'> names its axes for the reader; TypeScript does not check them. */
export type T<_Axes extends string = string> = tf.Tensor;
export type Tensors = Record<string, tf.Tensor>;

/** Wrong input: one line, exit code 2. */
export class UsageError extends Error {
  override readonly name = 'UsageError';
}
export function refuse(message: string): never {
  throw new UsageError(message);
}
/** Progress and warnings go to stderr, results to stdout. */
export function say(line: string) {
  io.endLiveLine();
  process.stderr.write(`${line}\n`);
}

export const range = (from: number, to: number) =>
  Array.from({ length: Math.max(0, to - from) }, (_, i) => from + i);
export const sum = (values: Iterable<number>) => [...values].reduce((a, b) => a + b, 0);
/** 0 … count − 1 in batches of at most `size`. */
export const inBatches = (count: number, size: number) =>
  range(0, Math.ceil(count / size)).map(b => range(b * size, Math.min((b + 1) * size, count)));

// ---- A. Config ----
// One record gives each field its type, default, bounds, flag (kebab-case) and line in --help. The
// defaults are the paper's; where they are 0 ("auto"), its target gets the paper's sizes.

const real = (value: number, help: string, min = 0, max = 1e12) => ({ value, help, min, max });
const int = (...field: Parameters<typeof real>) => ({ ...real(...field), integer: true });
const text = (value: string, help: string, choices = '') => ({ value, help, choices });
const place = (help: string) => ({ value: '', help, place: true }); // a file, folder or hub name
const flag = (value: boolean, help: string) => ({ value, help });

const GROUPS = {
  'Target and data': {
    model: place('Hugging Face folder, or hub id org/name[@revision]'),
    data: place('.txt, .jsonl, .json rows of ids, .parquet, or a hub data set'),
    evalData: place('held-out data; else the last 5 % of the documents'),
    labels: place('JSON: the rules that hold in rows of --eval-data; adds a scoreboard'),
    seqLen: int(512, 'tokens in a row', 1, 1 << 20),
    components: text('auto', 'pattern=C,…: "*.q_proj=64", first match; auto: C = max(dIn, dOut)'),
    out: place('run folder; else runs/<model>-<time>'),
  },
  Training: {
    nSteps: int(400_000, 'training steps', 1),
    batchSize: int(64, 'rows in a batch; on a CPU engine 2 if not given', 1),
    microBatches: int(1, 'shards of a batch (R), one after another', 1),
    seed: int(0, 'of all random numbers', 0, 2 ** 31 - 1),
    mainLr: real(5e-5, 'AdamW learning rate'),
    optimizer: text('adamw', 'what moves matrices', 'adamw muon'),
    mainLrFinalFrac: real(0.1, 'where its cosine ends', 0, 1),
    gradClipComponents: real(0.01, 'clips the gradient norm of all V and U; 0 = off'),
    gradClipCi: real(0, 'and of the CI function; 0 = off'),
    faithfulnessWarmupSteps: int(400, 'first steps, on faithfulness alone'),
    faithfulnessWarmupLr: real(1e-3, 'their learning rate'),
    faithfulnessWarmupLrFinalFrac: real(1, 'where its cosine ends; 1 = constant', 0, 1),
  },
  Losses: {
    coeffFaith: real(1e7, 'coefficient of the faithfulness loss'),
    coeffImp: real(2e-4, 'of the importance loss'),
    coeffStoch: real(0.5, 'of the stochastic reconstruction loss'),
    coeffPpgd: real(0.5, 'of the adversarial one; 0 = no adversary'),
    pStart: real(2, 'exponent p of the importance loss at the start', 0.01, 10),
    pEnd: real(0.4, 'and at the end (linear)', 0.01, 10),
    impEps: real(1e-12, 'added to g before the power'),
    impBeta: real(0.5, 'weight of the frequency term'),
    leakyAlpha: real(0.01, 'slope of the leaky sigmoids outside [0, 1]', 0, 1),
  },
  'CI function': {
    ciDModel: int(0, 'width; 0 = auto: 8/3 of the target width', 0, 1 << 17),
    ciNBlocks: int(0, 'blocks; 0 = auto: twice the target layers', 0, 4096),
    ciNHeads: int(0, 'heads; 0 = auto: 4 to 16, one per 64 of width', 0, 4096),
    ciMlpHidden: int(0, 'MLP width; 0 = auto: 4 times the width', 0, 1 << 20),
    ciRopeBase: real(10_000, 'base of its rotary embedding', 1),
  },
  'Persistent PGD': {
    ppgdLr: real(0.01, 'learning rate of the sources'),
    ppgdLrFinalFrac: real(1, 'where its cosine ends; 1 = constant', 0, 1),
    ppgdWarmupPct: real(0.025, 'share of the steps in which it rises from 0', 0, 1),
    ppgdBeta1: real(0.5, 'of their Adam', 0, 0.999999),
    ppgdBeta2: real(0.99, 'of their Adam', 0, 0.999999),
    ppgdEps: real(1e-8, 'of their Adam'),
    ppgdInnerSteps: int(2, 'moves before the losses of a step', 0, 1000),
  },
  Evaluation: {
    evalFreq: int(1000, 'steps between evaluations; 0 = only at the end'),
    slowEvalFreq: int(5000, 'steps between slow ones; 0 = only at the end'),
    evalBatchSize: int(0, 'rows it reads; 0 = auto: the batch size'),
    ciAliveThreshold: real(0, 'a component counts in L0 where g is above', 0, 1),
    roundingThreshold: real(0, 'rounded masks are 1 where g is above', 0, 1),
    pgdEvalStepSize: real(0.1, 'step of a fresh sign-PGD adversary'),
    pgdEvalNSteps: int(20, 'its steps', 0, 10_000),
  },
  Run: {
    logEvery: int(100, 'steps between lines of metrics.jsonl', 1),
    saveEvery: int(5000, 'steps between checkpoints; 0 = only at the end'),
    harvest: flag(true, 'harvest and page at the end (--no-harvest)'),
    harvestRows: int(4096, 'training rows that it reads; 0 = all'),
  },
  Engine: {
    engine: text('auto', 'TensorFlow on GPU, else the fastest', 'auto onnx tensorflow webgpu wasm'),
    precision: text('auto', 'of matrix products; auto: tf32 on CUDA', 'auto float32 tf32 bf16'),
    graph: flag(true, 'trace functions into graphs (--no-graph: op by op)'),
    xla: text('auto', 'compile with XLA; auto: on CPUs from 10,000 steps', 'auto on off'),
    threads: int(0, 'CPU threads of the native engines; 0 = all cores', 0, 1024),
  },
};
const FIELDS = {
  ...GROUPS['Target and data'],
  ...GROUPS.Training,
  ...GROUPS.Losses,
  ...GROUPS['CI function'],
  ...GROUPS['Persistent PGD'],
  ...GROUPS.Evaluation,
  ...GROUPS.Run,
  ...GROUPS.Engine,
};
export type Config = { [K in keyof typeof FIELDS]: (typeof FIELDS)[K]['value'] };
const defaults = Object.entries(FIELDS).map(([name, { value }]) => [name, value]);
export const DEFAULTS: Config = Object.fromEntries(defaults);

// ---- B. Components ----
// Each decomposed weight W [dOut,dIn] becomes a sum of C rank-one matrices, Wᵀ ≈ V U with V [dIn,C]
// and U [C,dOut]. What they do not (yet) explain is the delta component Δ = W − (V U)ᵀ.

/** A linear layer of the target: y = x Wᵀ + b. */
export type LinearLayer = { path: string; dIn: number; dOut: number };
/** How linear layers are computed: by the target's weights, or by masked components. */
export type Linear = (path: string, x: T<'N dIn'>) => T<'N dOut'>;

/** The frozen network, as far as the method knows it. */
export interface Target {
  linears: LinearLayer[]; // those that may be decomposed
  /** Wᵀ [dIn,dOut] under the path of its layer, a bias [dOut] under `${path}.bias`. */
  weights: ReadonlyMap<string, tf.Variable>;
  /**
   * The outputs for inputs [B,S] (tokens, int32) or [B,S,·] (features): one row a position, or
   * fewer. Every layer of `linears` is computed by `linear`.
   */
  forward(inputs: T<'B S'>, linear: Linear): T<'N out'>;
  compare: Comparison; // `kl` or `mse` of section D
  nextToken?: boolean; // its outputs predict that: evaluation adds cross-entropies
  source?: Origin & { type: string; sha256: string }; // for config.json
}
/** A model's folder, or hub id and commit. */
type Origin = { path: string; commit?: string };

/** A decomposed layer: columns offset … offset + C of [N,ΣC] tensors. */
export type Module = LinearLayer & { C: number; offset: number };

/** What stays fixed in a run. Modules are sorted by path; `ci`: another CI function than ours. */
export type Problem<Net extends Target = Target> = {
  target: Net;
  modules: Module[];
  config: Config;
  ci?: CiFunction;
};
export const totalC = (modules: readonly Module[]) => sum(modules.map(m => m.C));

/** As in components.safetensors: components.<path>.V and .U, ci_fn.*. */
export type Params = Record<string, tf.Variable>;
export const V = (params: Tensors, { path }: Module): T<'dIn C'> => params[`components.${path}.V`]!;
export const U = (params: Tensors, { path }: Module): T<'C dOut'> =>
  params[`components.${path}.U`]!;

/** All products are of matrices: TFJS's own product of [B,S,k] and [k,m] has no gradient. */
export const matmul = (a: T<'n k'>, b: T<'k m'>, transposeB = false): T<'n m'> =>
  tf.matMul(a as tf.Tensor2D, b as tf.Tensor2D, false, transposeB);
export const indicator = (condition: T): T => condition.cast('float32');
const addBias = (y: T<'N dOut'>, bias?: T<'dOut'>) => (bias ? y.add(bias) : y);
const weightOf = ({ weights }: Pick<Target, 'weights'>, name: string) =>
  weights.get(name) ?? refuse(`no weight ${name}`);

/** Columns of the given widths; tf.split's own gradient throws where there is only one. */
const splitColumns = (x: T, widths: number[]): T[] =>
  widths.length > 1 ? tf.split(x, widths, 1) : [x];

/** x Wᵀ + b, as the target has it. */
export const ownLinear =
  (target: Target): Linear =>
  (path, x) =>
    addBias(matmul(x, weightOf(target, path)), target.weights.get(`${path}.bias`));

/** The masks of one forward, per position. */
export interface Masks {
  mask: T<'N ΣC'>; // m, of the components
  delta?: T<'N M'>; // δ, of the delta components; absent: 0
  route?: T<'N M'>; // r = 1: by components, 0: by Wᵀ; absent: 1
}

/**
 * The masked linear layers. With component mask m, delta mask δ and routing r the formula is
 *   y = r [ ((x V) ⊙ m) U + δ (x Δᵀ) ] + (1 − r) x Wᵀ + b,   Δᵀ = Wᵀ − V U.
 * Put Δᵀ in, collect (x V) U and x Wᵀ, and Δ never has to be formed:
 *   y = ((x V) ⊙ a) U + k ⊙ (x Wᵀ) + b,   a = r (m − δ),   k = 1 − r (1 − δ).
 */
export function maskedLinear({ target, modules }: Problem, params: Tensors, masks: Masks): Linear {
  const ones = modules.map(() => 1);
  const widths = modules.map(m => m.C);
  const perModule = (x: T<'N M'>) => splitColumns(x, ones);
  const mask = splitColumns(masks.mask, widths);
  const delta = masks.delta && perModule(masks.delta);
  const route = masks.route && perModule(masks.route);
  // k, the kept share of x Wᵀ: without routing δ, and without δ too 0.
  const keep = masks.route
    ? perModule(tf.sub(1, masks.route.mul(tf.sub(1, masks.delta ?? 0))))
    : delta;
  const own = ownLinear(target);
  return (path, x) => {
    const i = modules.findIndex(m => m.path === path);
    const module = modules[i];
    if (!module) return own(path, x);
    let a = delta ? mask[i]!.sub(delta[i]!) : mask[i]!;
    if (route) a = route[i]!.mul(a);
    let y = matmul(matmul(x, V(params, module)).mul(a), U(params, module));
    if (keep) y = y.add(keep[i]!.mul(matmul(x, weightOf(target, path))));
    return addBias(y, target.weights.get(`${path}.bias`));
  };
}

export const maskedForward = (problem: Problem, params: Tensors, inputs: T, masks: Masks): T =>
  problem.target.forward(inputs, maskedLinear(problem, params, masks));

/** A forward that keeps what enters and leaves every linear layer, by path. */
export type Pass = ReturnType<typeof recordedForward>;
export function recordedForward(target: Target, inputs: T<'B S'>, linear = ownLinear(target)) {
  const acts: Record<string, T<'N dIn'>> = {};
  const outputs: Record<string, T<'N dOut'>> = {};
  const output: T<'N out'> = target.forward(inputs, (path, x) => {
    acts[path] = x;
    outputs[path] = linear(path, x);
    return outputs[path];
  });
  return { inputs, acts, outputs, output };
}

/** Resolves --components: "pattern=C,…", where * is any text and the first match counts. */
export function chooseModules(linears: readonly LinearLayer[], spec: string): Module[] {
  const paths = linears.map(l => l.path);
  const rules = (spec === 'auto' ? [] : spec.split(',')).map(rule => {
    const [, pattern = '', C = 0] = /^([\w.*]+)=(\d{1,7})$/.exec(rule.trim()) ?? [];
    if (+C < 1) refuse(`--components: got ${rule}, takes pattern=C, as in "*.q_proj=64"`);
    const regex = new RegExp(`^${pattern.replaceAll('.', '\\.').replaceAll('*', '.*')}$`);
    if (!paths.some(name => regex.test(name)))
      refuse(`--components: ${pattern} matches none of ${paths.join(', ')}`);
    return { regex, C: +C };
  });
  const modules: Module[] = [];
  for (const layer of [...linears].sort((a, b) => (a.path < b.path ? -1 : 1))) {
    const auto = Math.max(layer.dIn, layer.dOut);
    const C = spec === 'auto' ? auto : rules.find(r => r.regex.test(layer.path))?.C;
    if (C) modules.push({ ...layer, C, offset: totalC(modules) });
  }
  return modules;
}

// ---- C. CI function ----
// A bidirectional transformer reads what enters all modules, and says for each position how
// causally important each component is.

/** A CI function; its parameters are named ci_fn.*, weights [out,in] and biases [out]. */
export interface CiFunction {
  shapes(problem: Problem): Record<string, number[]>;
  /** Logits z. `input`: every module's activations, RMS-normed without a scale, side by side. */
  logits(problem: Problem, params: Tensors, input: T<'N ΣdIn'>, S: number): T<'N ΣC'>;
}

/** The paper's CI function: a pre-norm transformer without a final norm. */
export const ciTransformer: CiFunction = {
  shapes({ modules, config }) {
    const { ciDModel: d, ciMlpHidden: hidden } = config;
    const shapes: Record<string, number[]> = {};
    const addLinear = (name: string, dIn: number, dOut: number) => {
      shapes[`ci_fn.${name}.weight`] = [dOut, dIn];
      shapes[`ci_fn.${name}.bias`] = [dOut];
    };
    addLinear('proj_in', sum(modules.map(m => m.dIn)), d);
    for (let i = 0; i < config.ciNBlocks; i++) {
      for (const p of 'qkvo') shapes[`ci_fn.blocks.${i}.attn.${p}_proj.weight`] = [d, d];
      addLinear(`blocks.${i}.mlp.0`, d, hidden);
      addLinear(`blocks.${i}.mlp.2`, hidden, d);
    }
    addLinear('proj_out', d, totalC(modules));
    return shapes;
  },
  logits({ config }, params, input, S) {
    const B = input.shape[0]! / S;
    const frequencies = inverseWavelengths(config.ciDModel / config.ciNHeads, config.ciRopeBase);
    const linear = (name: string, x: T): T =>
      addBias(matmul(x, params[`ci_fn.${name}.weight`]!, true), params[`ci_fn.${name}.bias`]);
    let x: T<'N d'> = linear('proj_in', input);
    for (let i = 0; i < config.ciNBlocks; i++) {
      const block = `blocks.${i}`;
      let h: T<'N d'> = rmsNormalize(x, FLOAT32_EPSILON);
      const heads = (p: string) =>
        toHeads(linear(`${block}.attn.${p}_proj`, h), B, S, config.ciNHeads);
      const [q, k] = [rotate(heads('q'), frequencies), rotate(heads('k'), frequencies)];
      x = x.add(linear(`${block}.attn.o_proj`, attend(q, k, heads('v'), false)));
      h = rmsNormalize(x, FLOAT32_EPSILON);
      x = x.add(linear(`${block}.mlp.2`, gelu(linear(`${block}.mlp.0`, h))));
    }
    return linear('proj_out', x);
  },
};
const FLOAT32_EPSILON = 1.1920929e-7; // the default ε of torch's rms_norm
const ciLogits = (problem: Problem, params: Tensors, input: T, S: number) =>
  (problem.ci ?? ciTransformer).logits(problem, params, input, S);

/**
 * The lower-leaky hard sigmoid g = clamp(z, 0, 1), which builds masks. Its gradient is made by
 * hand: the upstream gradient where 0 < z ≤ 1; α times it where z ≤ 0 and it would push z up, so
 * that a dead component can be revived and is never pushed deeper; 0 elsewhere.
 */
export const lowerLeaky = (z: T<'N ΣC'>, alpha: number): T<'N ΣC'> =>
  tf.customGrad((x, save) => {
    (save as tf.GradSaveFunc)([x as T]);
    const gradFunc = (dy: T, [z]: T[]) => {
      const above = z!.step();
      const inside = above.sub(z!.sub(1).step());
      return dy.mul(inside).add(dy.minimum(0).mul(alpha).mul(tf.sub(1, above)));
    };
    return { value: (x as T).clipByValue(0, 1), gradFunc };
  })(z);

/** The upper-leaky one, g⁺ = clamp(z, 0, 1) + α relu(z − 1); it enters the importance loss. */
export const upperLeaky = (z: T<'N ΣC'>, alpha: number): T<'N ΣC'> =>
  z.clipByValue(0, 1).add(tf.mul(alpha, z.sub(1).relu()));

/** The target's forward, and the importances that the CI function reads off it. */
export function importances(problem: Problem, params: Tensors, inputs: T<'B S'>) {
  const [B = 0, S = 0] = inputs.shape;
  const pass = recordedForward(problem.target, inputs);
  const normed = problem.modules.map(m => rmsNormalize(pass.acts[m.path]!, FLOAT32_EPSILON));
  const input: T<'N ΣdIn'> = tf.concat(normed, 1);
  const z = ciLogits(problem, params, input, S);
  return { pass, input, z, g: lowerLeaky(z, problem.config.leakyAlpha), N: B * S, S };
}

// ---- D. Losses ----

/** Σ ‖Δ‖² / Σ numel(Δ) over all modules: with everything on, the parts add up to the target. */
export function faithfulnessLoss({ target, modules }: Problem, params: Tensors): T {
  const delta = (m: Module) => weightOf(target, m.path).sub(matmul(V(params, m), U(params, m)));
  const squares = modules.map(m => delta(m).square().sum());
  return tf.addN(squares).div(sum(modules.map(m => m.dIn * m.dOut)));
}

/**
 * Importance minimality: Σ_c [ μ_c + β μ_c log2(1 + R σ_c) ] with μ_c = σ_c / N and
 *   σ_c = Σ over positions of (g⁺ + ε)^p.
 * The first term wants few components at each position (p < 1 prefers exact zeros), the second
 * rarely used ones. R: a shard's σ is about 1/R of the batch's, R σ estimates it.
 */
export function importanceLoss(gUpper: T<'N ΣC'>, p: T, config: Config, R: number): T {
  // ε: with p < 1 the slope at 0 is infinite. exp(p ln x): TensorFlow's pow is slow on a CPU.
  const sigma: T<'ΣC'> = gUpper.add(config.impEps).log().mul(p).exp().sum(0);
  const mu = sigma.div(gUpper.shape[0]!);
  const log2 = sigma.mul(R).add(1).log().mul(Math.LOG2E);
  return mu.mul(log2.mul(config.impBeta).add(1)).sum();
}

/** How outputs are compared with the target's own: scalars. */
export interface Comparison {
  metric: string; // the prefix of its metrics
  loss: Compare; // for training: differentiable in the second argument
  measure: Compare; // the same for evaluation: exact when it is small
}
type Compare = (own: T<'N out'>, predicted: T<'N out'>) => T;
/** The mean of (prediction − own)². */
export const mse: Comparison = {
  metric: 'recon/mse',
  loss: (own, predicted) => predicted.squaredDifference(own).mean(),
  measure: (own, predicted) => mse.loss(own, predicted),
};
/** Of logits: the mean over rows of KL(target ‖ prediction), in nats. */
export const kl: Comparison = {
  metric: 'ce_kl/kl',
  // The gradient is made by hand: d logits = (softmax(logits) − target) / N.
  loss: (own, predicted) =>
    tf.customGrad((x, save) => {
      const [logProbs, log] = [own.logSoftmax(), (x as T).logSoftmax()];
      const probs = logProbs.exp();
      (save as tf.GradSaveFunc)([log, probs]);
      const N = log.shape[0]!;
      const gradFunc = (dy: T, [log, probs]: T[]) => log!.exp().sub(probs!).mul(dy.div(N));
      return { value: probs.mul(logProbs.sub(log)).sum().div(N), gradFunc };
    })(predicted),
  // With d = ln p − ln q, Σ p d = Σ p (d + e^−d − 1): no term is negative, so small
  // values survive float32 sums.
  measure(own, predicted) {
    const logProbs = own.logSoftmax();
    const d = logProbs.sub(predicted.logSoftmax());
    const terms = logProbs.exp().mul(d.add(d.neg().exp().sub(1)));
    return terms.sum().div(own.shape[0]!);
  },
};

/** m = g + (1 − g) u with u in [0, 1]: a mask may fall to g, and no further. */
export const interpolate = (g: T<'N ΣC'>, u: T<'N ΣC'>): T<'N ΣC'> => g.add(tf.sub(1, g).mul(u));

/**
 * Routing: at each position, k uniform in {1..M}; the k modules with the largest draws run through
 * components, the others by W.
 */
export function randomRouting(draws: T<'N M'>, countDraw: T<'N 1'>): T<'N M'> {
  const M = draws.shape[1]!;
  if (M === 1) return tf.onesLike(draws);
  const rank: T<'N'> = countDraw.mul(M).floor().cast('int32').flatten(); // k − 1
  const sorted: T<'N M'> = tf.topk(draws, M).values; // descending
  const kth: T<'N 1'> = sorted.mul(tf.oneHot(rank as tf.Tensor1D, M)).sum(1, true);
  return indicator(draws.greaterEqual(kth));
}

/** The random part of the stochastic reconstruction loss. */
export type Draws = { u: T<'N ΣC'>; delta: T<'N M'>; route: T<'N M'> };
export function stochasticDraws({ modules }: Problem, N: number, key: T): Draws {
  const M = modules.length;
  const drawn = (columns: number, purpose: number) => uniform([N, columns], key, purpose);
  return {
    u: drawn(totalC(modules), PURPOSE.mask),
    delta: drawn(M, PURPOSE.delta),
    route: randomRouting(drawn(M, PURPOSE.route), drawn(1, PURPOSE.routeCount)),
  };
}

const reconstruction = (problem: Problem, params: Tensors, pass: Pass, masks: Masks) =>
  problem.target.compare.loss(pass.output, maskedForward(problem, params, pass.inputs, masks));

/** Reconstruction with random masks, a random subset of the modules routed through components. */
export const stochasticLoss = (
  problem: Problem,
  params: Tensors,
  pass: Pass,
  g: T<'N ΣC'>,
  draws: Draws,
): T => reconstruction(problem, params, pass, { ...draws, mask: interpolate(g, draws.u) });

/** Reconstruction with the adversary's masks: the last M sources are δ. No routing. */
export function adversarialLoss(
  problem: Problem,
  params: Tensors,
  pass: Pass,
  g: T<'N ΣC'>,
  sources: T<'N ΣC+M'>,
): T {
  const sizes = [totalC(problem.modules), problem.modules.length];
  const [s, delta] = tf.split(sources, sizes, 1) as [T, T];
  return reconstruction(problem, params, pass, { mask: interpolate(g, s), delta });
}

interface LossInputs {
  problem: Problem;
  params: Tensors;
  pass: Pass;
  z: T<'N ΣC'>;
  g: T<'N ΣC'>;
  draws: Draws;
  sources: T<'N ΣC+M'>;
  feeds: StepFeeds;
}
type Loss = { coefficient: keyof Config; of: (inputs: LossInputs) => T };
/** total = Σ coefficient × loss. A further one: an entry here, a field in A; only ppgd reads s. */
export const LOSSES = {
  faith: { coefficient: 'coeffFaith', of: x => faithfulnessLoss(x.problem, x.params) },
  imp: {
    coefficient: 'coeffImp',
    of({ problem: { config }, z, feeds }) {
      const gUpper = upperLeaky(z, config.leakyAlpha);
      return importanceLoss(gUpper, feeds.p, config, config.microBatches);
    },
  },
  stoch: {
    coefficient: 'coeffStoch',
    of: x => stochasticLoss(x.problem, x.params, x.pass, x.g, x.draws),
  },
  ppgd: {
    coefficient: 'coeffPpgd',
    of: x => adversarialLoss(x.problem, x.params, x.pass, x.g, x.sources),
  },
} satisfies Record<string, Loss>;
const lossList: [string, Loss][] = Object.entries(LOSSES);

// ---- E. The adversary ----
// Persistent PGD (projected gradient ascent): s has a row for each batch slot and position, which
// lives on from step to step while its tokens change. In each step the adversary makes
// `ppgdInnerSteps` moves before the losses are taken and one after; its Adam counts all.

/** The sources s [N,ΣC+M] in [0, 1], and the moments of their Adam. */
type Sources<X extends T = T> = { s: X; m: X; v: X };

/** One move: an ascent step, clamped to [0, 1]; c1, c2: Adam's bias corrections. */
export function ascend(old: Sources, grad: T, config: Config, lr: T, c1: T, c2: T): Sources {
  const betas = { beta1: config.ppgdBeta1, beta2: config.ppgdBeta2, eps: config.ppgdEps };
  const { direction, m, v } = adam(grad, old.m, old.v, betas, c1, c2, lr);
  return { s: old.s.add(direction).clipByValue(0, 1), m, v };
}

type Betas = typeof MAIN_BETAS;
/** Adam's direction lr m̂ / (√v̂ + ε) and its new moments; the bias corrections are c = 1 − βᵗ. */
export function adam(grad: T, m: T, v: T, betas: Betas, c1: T, c2: T, lr: T = tf.scalar(1)) {
  const { beta1, beta2, eps } = betas;
  const newM = m.mul(beta1).add(grad.mul(1 - beta1));
  const newV = v.mul(beta2).add(grad.square().mul(1 - beta2));
  // m̂ / (√v̂ + ε) = m (√c2 / c1) / (√v + ε √c2) corrects with scalars.
  const root = c2.sqrt();
  const direction = newM.mul(lr.mul(root).div(c1)).div(newV.sqrt().add(tf.mul(eps, root)));
  return { direction, m: newM, v: newV };
}

// ---- F. The step ----

/** What changes with the step: the schedule's numbers, the inputs [B,S,…], the random key. */
export type StepFeeds = Record<keyof ReturnType<typeof schedule> | 'inputs' | 'key', T>;
type AdamFeeds = Pick<StepFeeds, 'lrMain' | 'c1' | 'c2'>;

/**
 * The whole method on one batch (or one of its shards). It assigns nothing: it returns losses, L0,
 * the gradients of both groups of parameters, and the moved sources.
 * `given`: draws in place of those that follow from the key.
 */
export function lossesAndGradients(
  problem: Problem,
  params: Tensors,
  old: Sources,
  feeds: StepFeeds,
  given?: Draws,
) {
  const { config } = problem;
  const adversary = config.coeffPpgd > 0;
  const moves = adversary ? config.ppgdInnerSteps : 0; // before the losses
  const [c1, c2] = [tf.unstack(feeds.ppgdC1), tf.unstack(feeds.ppgdC2)]; // one for each move

  // 1. The target as it is, and how important each component is at each position.
  const { pass, input, z, g, N, S } = importances(problem, params, feeds.inputs);
  const draws = given ?? stochasticDraws(problem, N, feeds.key);

  // 2. The adversary's moves before the losses, each up the gradient of the adversarial loss.
  let sources = old;
  for (let k = 0; k < moves; k++) {
    const [grad] = tf.grads(s => adversarialLoss(problem, params, pass, g, s))([sources.s]);
    sources = ascend(sources, grad!, config, feeds.lrPpgd, c1[k]!, c2[k]!);
  }

  // 3. The losses, of V, U, z and s. g is made anew: no gradient would reach z through that of 1.
  const losses = () => {
    const g = lowerLeaky(z, config.leakyAlpha);
    const inputs = { problem, params, pass, z, g, draws, sources: sources.s, feeds };
    return tf.stack(lossList.map(([, loss]) => loss.of(inputs)));
  };

  // 4. The gradients of total = Σ coefficient × loss: the coefficients are the upstream gradient of
  //    the vector of losses. They reach down to z; dz goes on through the CI function, whose
  //    forward runs again, since that in 1 was not taped (a traced graph merges the two).
  const components = ofGroup(params, 'components');
  const upstream = tf.tensor1d(coefficientsOf(config));
  const { value, grads } = tf.valueAndGrads(losses)([...components, z, sources.s], upstream);
  const [dz, dSources] = grads.slice(components.length) as [T, T];
  const ciGrads = tf.grads(() => ciLogits(problem, params, input, S))(ofGroup(params, 'ci_fn'), dz);

  // 5. The adversary's last move needs no backward pass of its own: s enters no other loss, so its
  //    gradient is the total's, divided by the coefficient.
  const grad = dSources.div(config.coeffPpgd);
  if (adversary) sources = ascend(sources, grad, config, feeds.lrPpgd, c1[moves]!, c2[moves]!);
  return {
    losses: value, // in the order of LOSSES
    gradients: {
      components: sideBySide(grads.slice(0, components.length)),
      ci_fn: sideBySide(ciGrads),
    },
    sources,
    l0: indicator(g.greater(config.ciAliveThreshold)).sum().div(N),
  };
}
const coefficientsOf = (config: Config) =>
  lossList.map(([, { coefficient }]) => Number(config[coefficient]));

/** The parameters are two groups, clipped separately: V and U, and the CI function. */
type Group = 'components' | 'ci_fn';
const eachGroup = <X>(make: (group: Group) => X): Record<Group, X> => ({
  components: make('components'),
  ci_fn: make('ci_fn'),
});
const ofGroup = <X extends T>(params: Record<string, X>, group: Group): X[] =>
  Object.entries(params).flatMap(([name, x]) => (name.startsWith(group) ? x : []));
/** In one vector: Adam is a few large ops then. */
const sideBySide = (tensors: T[]): T<'n'> => tf.concat(tensors.map(x => x.flatten()));

/** What a step changes. m, v: Adam's moments, one vector a group. Sources: [batchSize·S, ΣC+M]. */
export interface State {
  params: Params;
  m: Record<Group, tf.Variable>;
  v: Record<Group, tf.Variable>;
  sources: Sources<tf.Variable>;
}

const MAIN_BETAS = { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
/** AdamW with weight decay 0 on one group of parameters; `muon`: its matrices move by Muon. */
function adamUpdate(state: State, group: Group, gradient: T<'n'>, feeds: AdamFeeds, muon = false) {
  const [m, v] = [state.m[group], state.v[group]];
  const step = adam(gradient, m, v, MAIN_BETAS, feeds.c1, feeds.c2, feeds.lrMain);
  const moved = ofGroup(state.params, group);
  const sizes = moved.map(x => x.size);
  const parts = (x: T) => tf.split(x, sizes).map((part, i) => part.reshape(moved[i]!.shape));
  const [moves, momenta] = [parts(step.direction), muon ? parts(step.m) : []];
  for (const [i, param] of moved.entries()) {
    const byMuon = muon && param.rank === 2;
    param.assign(param.sub(byMuon ? feeds.lrMain.mul(orthogonal(momenta[i]!)) : moves[i]!));
  }
  m.assign(step.m);
  v.assign(step.v);
}
/**
 * Muon's direction: the momentum with all singular values near 1 (five Newton-Schulz steps), times
 * 0.2 √max(r, c): the mean square of Adam's.
 */
export function orthogonal(momentum: T<'r c'>): T<'r c'> {
  const [r = 0, c = 0] = momentum.shape;
  if (r > c) return orthogonal(momentum.transpose()).transpose();
  let x = momentum.div(momentum.square().sum().sqrt().maximum(1e-7));
  for (const _ of range(0, 5)) {
    const a = matmul(x, x, true);
    x = x.mul(3.4445).add(matmul(a.mul(-4.775).add(matmul(a, a).mul(2.0315)), x));
  }
  return x.mul(0.2 * Math.sqrt(c));
}

type Vectors = Record<Group, T<'n'>>;
/** Clips the gradients and moves all parameters. @returns the norms before clipping */
export function applyGradients(
  { config }: Problem,
  state: State,
  grads: Vectors,
  feeds: AdamFeeds,
) {
  const norms = eachGroup(group => grads[group].square().sum().sqrt());
  // Gradients that are not finite move nothing: the last good parameters stay.
  const finite = tf.isFinite(norms.components.add(norms.ci_fn));
  const lrMain = tf.where(finite, feeds.lrMain, tf.scalar(0));
  const limits = { components: config.gradClipComponents, ci_fn: config.gradClipCi };
  eachGroup(group => {
    const gradient = grads[group];
    const scale = tf.minimum(1, tf.div(limits[group], norms[group].add(1e-6))); // as torch clips
    const clipped = limits[group] > 0 ? gradient.mul(scale) : gradient;
    const safe = tf.where(finite, clipped, tf.zerosLike(clipped));
    adamUpdate(state, group, safe, { ...feeds, lrMain }, config.optimizer === 'muon');
  });
  return norms;
}

/** Numbers by their names in metrics.jsonl. */
export type Metrics = Record<string, number>;

/**
 * Compiles the training step, which moves the state on. With microBatches = R > 1 the batch comes
 * in R shards: each has its own rows of the sources; losses and gradients are averaged over them.
 */
export function compileStep(engine: Engine, problem: Problem, state: State) {
  const { config } = problem;
  const { params, sources, m } = state;
  const R = config.microBatches;
  const forward = (feeds: StepFeeds, old: Sources) =>
    lossesAndGradients(problem, params, old, feeds);
  type Result = Omit<ReturnType<typeof forward>, 'sources'>;
  const update = ({ losses, l0, gradients }: Result, feeds: AdamFeeds): Tensors => {
    const norms = applyGradients(problem, state, gradients, feeds);
    const each = tf.unstack(losses);
    return {
      ...Object.fromEntries(lossList.map(([name], i) => [`loss/${name}`, each[i]!])),
      'train/l0': l0,
      'loss/total': losses.mul(coefficientsOf(config)).sum(),
      'grad_norm/components': norms.components,
      'grad_norm/ci_fn': norms.ci_fn,
    };
  };

  const whole = engine.compile('step', (feeds: StepFeeds) => {
    const result = forward(feeds, sources);
    for (const part of ['s', 'm', 'v'] as const) sources[part].assign(result.sources[part]);
    return update(result, feeds);
  });
  const shapes = eachGroup(group => m[group].shape);
  const shards = () =>
    engines.accumulate(engine.compile, R, lossList.length, sources, shapes, forward, update);
  const run = R > 1 ? shards() : (feedsOf: (r: number) => StepFeeds) => whole(feedsOf(0));
  return (step: number, data: Rows) =>
    tidyAsync(async () => {
      const rows = batchIndices(data.count, config.batchSize, step, config.seed);
      const size = rows.length / R;
      const feedsOf = (r: number) => ({
        ...asTensors(schedule(config, step)),
        inputs: inputBatch(data, rows.slice(r * size, (r + 1) * size)),
        key: randomKey(config.seed, step * R + r),
      });
      return scalars(await run(feedsOf));
    });
}

/** From 0 at the first step to 1 at the last. */
const progress = (step: number, nSteps: number) => (nSteps > 1 ? step / (nSteps - 1) : 0);
/** From 1 at the first step to `finalFrac` at the last. */
export const cosine = (step: number, nSteps: number, finalFrac: number) =>
  finalFrac + (1 - finalFrac) * 0.5 * (1 + Math.cos(Math.PI * progress(step, nSteps)));
const mainCorrections = (step: number) => ({
  c1: 1 - MAIN_BETAS.beta1 ** (step + 1),
  c2: 1 - MAIN_BETAS.beta2 ** (step + 1),
});

/** What follows from the step: learning rates, p, bias corrections of both Adams. */
export function schedule(config: Config, step: number) {
  const { nSteps, ppgdInnerSteps } = config;
  const warmup = Math.floor(config.ppgdWarmupPct * nSteps);
  const decayed = cosine(step - warmup, nSteps - warmup, config.ppgdLrFinalFrac);
  const t = range(1, ppgdInnerSteps + 2).map(k => step * (ppgdInnerSteps + 1) + k);
  return {
    ...mainCorrections(step),
    lrMain: config.mainLr * cosine(step, nSteps, config.mainLrFinalFrac),
    lrPpgd: config.ppgdLr * (step < warmup ? step / warmup : decayed),
    p: config.pStart + (config.pEnd - config.pStart) * progress(step, nSteps),
    ppgdC1: t.map(n => 1 - config.ppgdBeta1 ** n),
    ppgdC2: t.map(n => 1 - config.ppgdBeta2 ** n),
  };
}
const asTensors = <K extends string>(feeds: Record<K, number | number[]>) => {
  const entries = Object.entries<number | number[]>(feeds);
  return Object.fromEntries(entries.map(([k, x]) => [k, tf.tensor(x)])) as Record<K, T>;
};

const zeros = (shape: number[]): tf.Variable => tf.tidy(() => tf.variable(tf.zeros(shape), false));

/** V ~ N(0, 1/dIn), U ~ N(0, 1/C); the CI function as nn.Linear: uniform ±1/√fan_in, biases too. */
export function initialParams(problem: Problem): Params {
  const { modules, config, ci = ciTransformer } = problem;
  const params: Params = {};
  // Each array has the next purpose: the order of these lines is part of the seed.
  let purpose = PURPOSE.init;
  const draws = (n: number) => uniformArray(n, config.seed, 0, purpose++);
  const normal = (n: number, deviation: number) => {
    const [u, w] = [draws(n), draws(n)]; // Box-Muller
    const radius = (x: number) => deviation * Math.sqrt(-2 * Math.log(1 - x));
    return u.map((x, i) => radius(x) * Math.cos(2 * Math.PI * w[i]!));
  };
  for (const { path: name, dIn, dOut, C } of modules) {
    const [v, u] = [normal(dIn * C, 1 / Math.sqrt(dIn)), normal(C * dOut, 1 / Math.sqrt(C))];
    params[`components.${name}.V`] = makeVariable(v, [dIn, C]);
    params[`components.${name}.U`] = makeVariable(u, [C, dOut]);
  }
  const shapes = ci.shapes(problem);
  for (const [name, shape] of Object.entries(shapes)) {
    const fanIn = shapes[name.replace(/bias$/, 'weight')]?.[1] ?? shape[0]!;
    const bound = 1 / Math.sqrt(fanIn);
    const values = draws(sizeOf(shape)).map(u => bound * (2 * u - 1));
    params[name] = makeVariable(values, shape);
  }
  return params;
}

export function initialState({ modules, config }: Problem, params: Params): State {
  const shape = [config.batchSize * config.seqLen, totalC(modules) + modules.length];
  const s = makeVariable(uniformArray(sizeOf(shape), config.seed, 0, PURPOSE.sources), shape);
  const moments = () => eachGroup(group => zeros([sum(ofGroup(params, group).map(x => x.size))]));
  return { params, m: moments(), v: moments(), sources: { s, m: zeros(shape), v: zeros(shape) } };
}

/** The faithfulness warm-up: AdamW on V and U; its moments end at 0. Yields each step's loss. */
export async function* warmUp(engine: Engine, problem: Problem, state: State) {
  const { config } = problem;
  const steps = config.faithfulnessWarmupSteps;
  const components = ofGroup(state.params, 'components');
  const step = engine.compile('warm-up', (feeds: AdamFeeds) => {
    const loss = () => faithfulnessLoss(problem, state.params);
    const { value, grads } = tf.valueAndGrads(loss)(components);
    adamUpdate(state, 'components', sideBySide(grads), feeds);
    return { loss: value };
  });
  for (let i = 0; i < steps; i++) {
    const rate = cosine(i, steps, config.faithfulnessWarmupLrFinalFrac);
    const feeds = { lrMain: config.faithfulnessWarmupLr * rate, ...mainCorrections(i) };
    yield (await tidyAsync(async () => scalars(await step(asTensors(feeds))))).loss!;
  }
  for (const moment of [state.m.components, state.v.components])
    tf.tidy(() => moment.assign(tf.zerosLike(moment)));
}

// ---- G. Evaluation ----

/** Mean next-token cross-entropy in nats. */
export function crossEntropy(logProbs: T<'N vocab'>, tokens: T<'B S'>): T {
  const [B = 0, S = 0] = tokens.shape;
  const vocab = logProbs.shape[1]!;
  const predicted = tf.slice(logProbs.reshape([B, S, vocab]), [0, 0, 0], [B, S - 1, vocab]);
  const next = tf.oneHot(tf.slice(tokens, [0, 1], [B, S - 1]) as tf.Tensor2D, vocab);
  const total = predicted.mul(next).sum();
  return total.div(B * (S - 1)).neg();
}

/** Of batch b of an evaluation, 2 b: evaluationDraws takes two keys. */
export const evaluationKey = ({ seed }: Config, b: number) => randomKey(seed ^ 0x5eed, 2 * b);
/** Random numbers of an evaluation; `stoch`: of the strategy; `subset`: loss, hidden acts. */
function evaluationDraws(problem: Problem, N: number, key: T) {
  const draws = (i: number) => stochasticDraws(problem, N, key.add(tf.tensor1d([0, i], 'int32')));
  const random: T<'N ΣC'> = uniform([N, totalC(problem.modules)], key, PURPOSE.randomMask);
  return { stoch: draws(0), subset: draws(1), random };
}

/** Reconstruction under all masking strategies (δ only in stoch), losses but the adversary's. */
export function evaluateMasks(
  problem: Problem,
  params: Tensors,
  inputs: T,
  p: T,
  draws: ReturnType<typeof evaluationDraws>,
): Tensors {
  const { config, modules, target } = problem;
  const { pass, z, g } = importances(problem, params, inputs);
  const strategies: Record<string, Masks> = {
    ci_masked: { mask: g },
    unmasked: { mask: tf.ones([1, totalC(modules)]) },
    stoch_masked: { mask: interpolate(g, draws.stoch.u), delta: draws.stoch.delta },
    random_masked: { mask: draws.random },
    rounded_masked: { mask: indicator(g.greater(config.roundingThreshold)) },
    zero_masked: { mask: tf.zeros([1, totalC(modules)]) },
  };
  const gUpper = upperLeaky(z, config.leakyAlpha);
  const results: Tensors = {
    'loss/FaithfulnessLoss': faithfulnessLoss(problem, params),
    'loss/ImportanceMinimalityLoss': importanceLoss(gUpper, p, config, 1),
    'loss/StochasticReconSubsetLoss': stochasticLoss(problem, params, pass, g, draws.subset),
  };
  const own = target.nextToken ? pass.output.logSoftmax() : undefined;
  if (own) results['ce_kl/ce_target'] = crossEntropy(own, inputs);
  for (const [name, masks] of Object.entries(strategies)) {
    const output = maskedForward(problem, params, inputs, masks);
    results[`${target.compare.metric}_${name}`] = target.compare.measure(pass.output, output);
    // Cross-entropy is linear in log-probabilities: this is exact, a difference of two is rounding.
    const difference = own && crossEntropy(output.logSoftmax().sub(own), inputs);
    if (difference) results[`ce_kl/ce_difference_${name}`] = difference;
  }
  const active = indicator(g.greater(config.ciAliveThreshold)).mean(0); // [ΣC]
  return { ...results, active, meanCi: g.mean(0) };
}

/** Fresh PGD: one source for all positions. */
export const pgdStart = ({ modules }: Problem, key: T): T<'1 ΣC+M'> =>
  tf.tidy(() => uniform([1, totalC(modules) + modules.length], key, PURPOSE.pgd));
/** The loss at a source, and where sign ascent takes it. */
export function pgdStep(
  problem: Problem,
  params: Tensors,
  inputs: T,
  source: T<'1 ΣC+M'>,
  { pass, g }: { pass: Pass; g: T } = importances(problem, params, inputs),
) {
  const loss = (s: T) => adversarialLoss(problem, params, pass, g, s);
  const { value, grads } = tf.valueAndGrads(loss)([source]);
  const moved = source.add(tf.mul(problem.config.pgdEvalStepSize, grads[0]!.sign()));
  return { loss: value, next: moved.clipByValue(0, 1) };
}

/** Mean of (module output − the target's)² by module, under CI masks and stochastic ones [M]. */
export function hiddenActsErrors(problem: Problem, params: Tensors, inputs: T, draws: Draws) {
  const { target, modules } = problem;
  const { pass, g } = importances(problem, params, inputs);
  const errors = (masks: Masks) => {
    const { outputs } = recordedForward(target, inputs, maskedLinear(problem, params, masks));
    const error = (name: string) => outputs[name]!.squaredDifference(pass.outputs[name]!).mean();
    return tf.stack(modules.map(m => error(m.path)));
  };
  const stochastic = { mask: interpolate(g, draws.u), delta: draws.delta };
  return { CI: errors({ mask: g }), Stochastic: errors(stochastic) };
}

export function compileEvaluation(engine: Engine, problem: Problem, params: Params) {
  const { modules, config } = problem;
  const sumOut = sum(modules.map(m => m.dOut));
  type Feeds<K extends string> = Record<'inputs' | K, T>;
  const draws = ({ inputs, key }: Feeds<'key'>) =>
    evaluationDraws(problem, inputs.shape[0]! * inputs.shape[1]!, key);
  const masks = engine.compile('evaluate', (f: Feeds<'key' | 'p'>) =>
    evaluateMasks(problem, params, f.inputs, f.p, draws(f)),
  );
  const pgd = engine.compile('pgd', (f: Feeds<'source'>) =>
    pgdStep(problem, params, f.inputs, f.source),
  );
  const hidden = engine.compile('hidden acts', (f: Feeds<'key'>) =>
    hiddenActsErrors(problem, params, f.inputs, draws(f).subset),
  );

  /** Means over the rows; `meanCi`: mean g of every component. */
  const evaluate = async (rows: Rows, step: number, slow: boolean) => {
    const p = tf.scalar(schedule(config, Math.min(step, config.nSteps - 1)).p);
    const means: Record<string, Float64Array> = {};
    const add = async (share: number, results: Tensors) => {
      for (const [name, result] of Object.entries(results)) {
        const values = await numbers(result);
        means[name] ??= new Float64Array(values.length);
        for (const [i, value] of values.entries()) means[name][i]! += share * value;
      }
    };
    for (const [b, indices] of inBatches(rows.count, config.evalBatchSize).entries()) {
      const inputs = inputBatch(rows, indices);
      const key = evaluationKey(config, b);
      const share = indices.length / rows.count;
      await add(share, await masks({ inputs, key, p }));
      let source = pgdStart(problem, key);
      for (let i = 0; i < config.pgdEvalNSteps; i++) source = (await pgd({ inputs, source })).next;
      await add(share, { 'loss/PGDReconLoss': (await pgd({ inputs, source })).loss });
      if (slow) await add(share, await hidden({ inputs, key }));
    }
    const { meanCi, active, CI, Stochastic, ...values } = means;
    const metrics: Metrics = { 'eval/n_alive': meanCi!.filter(ci => ci >= 1e-6).length };
    for (const [name, [mean = 0]] of Object.entries(values)) {
      metrics[`eval/${name}`] = mean;
      if (name.includes('ce_difference')) {
        const ofZero = values['ce_kl/ce_difference_zero_masked']![0]!;
        metrics[`eval/${name.replace('difference', 'unrecovered')}`] = mean / ofZero;
      }
    }
    const threshold = config.ciAliveThreshold; // written as Python writes a float
    const l0 = `eval/l0/${threshold % 1 === 0 ? threshold.toFixed(1) : threshold}`;
    metrics[`${l0}_total`] = sum(active!);
    for (const { path, offset, C } of modules)
      metrics[`${l0}_${path}`] = sum(active!.subarray(offset, offset + C));
    for (const [kind, errors] of Object.entries(slow ? { CI, Stochastic } : {})) {
      const loss = `eval/loss/${kind}HiddenActsReconLoss`;
      for (const [i, m] of modules.entries()) metrics[`${loss}/${m.path}`] = errors![i]!;
      metrics[`${loss}/total`] = sum(modules.map((m, i) => (errors![i]! * m.dOut) / sumOut));
    }
    return { metrics, meanCi: meanCi! };
  };
  return (...args: Parameters<typeof evaluate>) => tidyAsync(() => evaluate(...args));
}

// ---- H. The run ----
// The run folder holds config.json, metrics.jsonl, components.safetensors, and state.safetensors,
// which only --resume needs.

export interface Run<Net extends Target = Target> {
  engine: Engine;
  problem: Problem<Net>;
  params: Params;
  data: Data;
  trained?: boolean; // and saved
}

/** A run on any network. Fields not given have their defaults; without `out` nothing is written. */
export async function newRun(
  target: Target,
  data: Data,
  changes: Partial<Config>,
  ci = ciTransformer,
): Promise<Run> {
  const asked = { ...DEFAULTS, ...changes, seqLen: data.train.seqLen };
  const engine = await startEngine(asked);
  const dModel = Math.max(...target.linears.map(l => l.dIn));
  const sizes = { dModel, nLayers: 1, context: asked.seqLen, contextField: 'row length' };
  const given = new Set([...Object.keys(changes), 'seqLen']);
  const config = resolveConfig(asked, sizes, given, engine.gpu);
  const modules = chooseModules(target.linears, config.components);
  const problem = { target, modules, config, ci };
  return { engine, problem, params: initialParams(problem), data };
}

/** More measures for slow evaluations. */
type Measures = ((run: Run) => () => Promise<Metrics>) | undefined;
type Options = {
  old?: RunRecord | undefined;
  stopped?: () => Promise<unknown>;
  measures?: Measures;
};
/**
 * The training loop: warm up; step, log, evaluate, save. `old`: the record of the run to go on
 * with; `stopped` is asked after each step. @returns the last evaluation; undefined if stopped
 */
export async function decompose(run: Run, { old, stopped, measures }: Options = {}) {
  const { engine, problem, params, data } = run;
  const { config: c } = problem;
  const now = recordOf(run);
  if (old) io.compareRuns(old, now, say);
  if (c.out) {
    fs.mkdirSync(c.out, { recursive: true });
    writeAtomic(path.join(c.out, 'config.json'), `${JSON.stringify(now, null, 1)}\n`);
  }
  const state = initialState(problem, params);
  const { m, v, sources } = state;
  const rest: Params = {}; // what --resume needs besides, by the names in state.safetensors
  for (const [part, of] of Object.entries({ 'adam.m': m, 'adam.v': v, ppgd: sources }))
    for (const [name, x] of Object.entries(of)) rest[`${part}.${name}`] = x;
  const metricsFile = path.join(c.out, 'metrics.jsonl');
  const log = (metrics: Metrics) => {
    if (c.out) fs.appendFileSync(metricsFile, `${JSON.stringify({ step: done, ...metrics })}\n`);
  };
  const save = async () => {
    if (c.out) await io.saveCheckpoint(c.out, done, params, rest);
  };
  const compiled = compileEvaluation(engine, problem, params);
  const heldOut = firstRows(data.heldOut, c.evalBatchSize);
  const measure = measures?.(run);
  const evaluate = async (slow: boolean) => {
    const { metrics } = await compiled(heldOut, done, slow);
    return { ...metrics, ...(slow && (await measure?.())) };
  };

  let done = (old && (await io.resume(c.out, params, rest, say))) || 0;
  if (done === 0) {
    const total = c.faithfulnessWarmupSteps;
    const show = io.startProgress(total);
    let i = 0;
    for await (const loss of warmUp(engine, problem, state)) {
      i++;
      show(i, () => `warm-up ${i}/${total}  faithfulness ${loss.toExponential(2)}`);
      await io.checkFinite(i, { 'warm-up loss/faith': loss }, params);
      if (await stopped?.()) return undefined; // nothing is saved yet: --resume begins again
    }
  }
  const step = compileStep(engine, problem, state);
  const show = io.startProgress(c.nSteps, done);
  let evaluated: Metrics | undefined;
  while (done < c.nSteps) {
    const started = performance.now();
    const metrics = await step(done, data.train);
    const { lrMain, lrPpgd, p } = schedule(c, done);
    done++;
    const last = done === c.nSteps;
    const due = (every: number) => last || (every > 0 && done % every === 0);
    await io.checkFinite(done, metrics, params);
    show(done, () => io.stepLine(done, c.nSteps, metrics));
    if (due(c.logEvery)) {
      const { numTensors, numBytes } = tf.memory();
      const rates = { 'lr/main': lrMain, 'lr/ppgd': lrPpgd, p };
      const memory = { 'memory/tensors': numTensors, 'memory/bytes': numBytes };
      const time = { 'time/ms_per_step': performance.now() - started };
      log({ ...metrics, ...rates, ...time, ...memory });
    }
    // The last step is saved before its evaluation, which may fail; others after it, so that a
    // resumed run finds all of its lines.
    if (last) await save();
    run.trained = last;
    if (due(c.evalFreq)) {
      evaluated = await evaluate(due(c.slowEvalFreq));
      log(evaluated);
    }
    const stop = await stopped?.();
    if (!last && (stop || due(c.saveEvery))) await save();
    if (stop) return undefined;
  }
  if (evaluated) return evaluated;
  run.trained = true;
  // A run resumed after its last step may have this line already.
  evaluated = await evaluate(true);
  const isOfNow = (line: Metrics) => line.step === done && 'eval/n_alive' in line;
  if (!io.readMetrics(metricsFile).some(isOfNow)) log(evaluated);
  return evaluated;
}

/** Writes beside and renames: nobody ever reads half a file. */
export function writeAtomic(file: string, content: string) {
  fs.writeFileSync(`${file}.tmp-${process.pid}`, content);
  fs.renameSync(`${file}.tmp-${process.pid}`, file);
}

type RunRecord = ReturnType<typeof recordOf>;
const recordOf = (run: Run) => io.runRecord(run, VERSION);
const VERSION = '0.1.0';

// ---- I. Harvest ----
// How often each component fires (g > 0), on which tokens, ahead of which predictions, and where
// most strongly, by dense counts. postprocess/harvest.ts counts more, in bounded memory.

/** Token, count, PMI = ln(n_ct N / (n_c n_t)) in nats. */
type TokenPmi = [token: string, count: number, pmi: number];
export type ShortHarvest = Awaited<ReturnType<typeof shortHarvest>>;
const MAX_CELLS = 3e7; // components x vocabulary: 120 MB a table
const [LIST, EXAMPLES, WINDOW, MIN_COUNT] = [10, 5, 8, 3];

export async function shortHarvest({ engine, problem, params, data }: Run) {
  const { target, modules, config } = problem;
  const rows = firstRows(data.train, config.harvestRows || data.train.count);
  const sumC = totalC(modules);
  const { vocab = 0 } = (target as Partial<LanguageModel>).arch ?? {};
  if (!target.nextToken || vocab * sumC > MAX_CELLS)
    refuse(`harvest: ${sumC} components x ${vocab} tokens are for postprocess/harvest.ts`);
  const tables = [[sumC], [sumC], [sumC + 1, vocab], [sumC + 1, vocab]].map(zeros);
  const count = engine.compile('short harvest', (f: Record<'inputs', T>) => {
    const { pass, g, N } = importances(problem, params, f.inputs);
    const fires: T<'N ΣC'> = indicator(g.greater(0));
    const rows: T<'N ΣC+1'> = tf.concat([fires, tf.ones([N, 1])], 1); // and a count of all
    const token: T<'N vocab'> = tf.oneHot(f.inputs.flatten() as tf.Tensor1D, vocab);
    const probs: T<'N vocab'> = pass.output.logSoftmax().exp();
    const products = [token, probs].map(columns => tf.matMul(rows, columns, true));
    const counts = [fires.sum(0), g.sum(0), ...products];
    for (const [i, table] of tables.entries()) table.assign(table.add(counts[i]!));
    const strongest = tf.topk(g.transpose(), 1);
    return { value: strongest.values.flatten(), at: strongest.indices.flatten() };
  });

  type Firing = { value: number; row: number; at: number };
  const strongest: Firing[][] = range(0, sumC).map(() => []);
  for (const indices of inBatches(rows.count, config.evalBatchSize)) {
    const batch = inputBatch(rows, indices);
    const found = await count({ inputs: batch });
    const [value, at] = await Promise.all([numbers(found.value), numbers(found.at)]);
    tf.dispose([batch, found]);
    const S = rows.seqLen;
    for (const [c, list] of strongest.entries()) {
      list.push({ value: value[c]!, row: indices[Math.floor(at[c]! / S)]!, at: at[c]! % S });
      list.sort((a, b) => b.value - a.value).splice(EXAMPLES);
    }
  }
  const [nC, ciSum, nIn, nOut] = await Promise.all(tables.map(numbers));
  tf.dispose(tables);

  const token = (id: number) => data.tokenizer?.id_to_token(id)?.replace(/[▁Ġ]/g, ' ') ?? `#${id}`;
  const text = (ids: ArrayLike<number>) => Array.from(ids, token).join('');
  const N = rows.count * rows.seqLen;
  /** Tokens that c meets more often than chance, the most surprising first. */
  const byPmi = (c: number, counts: Float32Array): TokenPmi[] => {
    const pairs = range(0, vocab).map((t): TokenPmi => {
      const [n, ofToken] = [counts[c * vocab + t]!, counts[sumC * vocab + t]!];
      const expected = (nC![c]! * ofToken) / N;
      return [token(t), n, Math.max(n, expected) < MIN_COUNT ? 0 : Math.log(n / expected)];
    });
    const above = pairs.filter(([, , pmi]) => pmi > 1e-4); // below that it is rounding
    return above.sort((a, b) => b[2] - a[2]).slice(0, LIST);
  };
  const marked = ({ row, at }: Firing) => {
    const ids = rows.row(row);
    const [from, to] = [Math.max(0, at - WINDOW), at + WINDOW];
    return `${text(ids.slice(from, at))}»${token(ids[at]!)}«${text(ids.slice(at + 1, to))}`;
  };
  const describe = (m: Module, index: number) => {
    const c = m.offset + index;
    return {
      module: m.path,
      index,
      density: nC![c]! / N, // share of the positions where it fires
      meanCi: ciSum![c]! / N,
      firesOn: byPmi(c, nIn!),
      predicts: byPmi(c, nOut!), // of the next token; counts are softmax mass
      examples: strongest[c]!.filter(firing => firing.value > 0).map(marked), // one a batch
    };
  };
  const all = modules.flatMap(m => range(0, m.C).map(i => describe(m, i)));
  return { positions: N, components: all.filter(c => c.density > 0) };
}

// ---- below: what this stands on ----

// ---- J. Language models ----
// From a Hugging Face folder. Every family is the same decoder with other options.

/** What a config.json says, in one vocabulary for all families. */
// biome-ignore format: few lines
export interface Architecture {
  type: string; names: Names;
  vocab: number; dModel: number; dMlp: number; nLayers: number;
  nHeads: number; nKvHeads: number; headDim: number;
  context: number; contextField: string; // the longest row, and the field that says so
  norm: 'rms' | 'layer'; eps: number;
  rotary: Float32Array | undefined; // RoPE's inverse wavelengths; undefined: learned positions
  qkv: 'separate' | 'concatenated' | 'by head'; // one layer each, or one for all, named as q
  conv1d: boolean; // linear layers are stored as [dIn,dOut], not as nn.Linear's [dOut,dIn]
  activation: keyof typeof ACTIVATIONS;
  parallelResidual: boolean; // the MLP reads the attention's input, not its output
  tied: boolean; // the head is the embedding, unless the file has one
}
/** State-dict names without `.weight`, those of a block within it; absent where there is none. */
// biome-ignore format: few lines
interface Names {
  embed: string; positions?: string; blocks: string; last: string; head: string;
  norm1: string; q: string; k?: string; v?: string; qNorm?: string; kNorm?: string; o: string;
  norm2: string; gate?: string; up: string; down: string;
}
// biome-ignore format: few lines
export const NAMES: Record<'llama' | 'llama_simple_mlp', Names> = {
  llama: {
    embed: 'model.embed_tokens', blocks: 'model.layers', last: 'model.norm', head: 'lm_head',
    norm1: 'input_layernorm', q: 'self_attn.q_proj', k: 'self_attn.k_proj', v: 'self_attn.v_proj',
    o: 'self_attn.o_proj', norm2: 'post_attention_layernorm',
    gate: 'mlp.gate_proj', up: 'mlp.up_proj', down: 'mlp.down_proj',
  },
  llama_simple_mlp: {
    embed: 'wte', blocks: 'h', last: 'ln_f', head: 'lm_head',
    norm1: 'rms_1', q: 'attn.q_proj', k: 'attn.k_proj', v: 'attn.v_proj', o: 'attn.o_proj',
    norm2: 'rms_2', up: 'mlp.c_fc', down: 'mlp.down_proj',
  },
};
const nameOf = ({ names }: Architecture, part: keyof Names, i: number) =>
  `${names.blocks}.${i}.${names[part]}`;

/** A target with logits [N,vocab]. */
export interface LanguageModel extends Target {
  arch: Architecture;
  dir: string;
  config: Record<string, unknown>; // config.json as it is
  source: NonNullable<Target['source']>;
}

export function linearLayers(arch: Architecture): LinearLayer[] {
  const { dModel, dMlp, nLayers, nHeads, nKvHeads, headDim, qkv } = arch;
  const [dQ, dKv] = [nHeads * headDim, nKvHeads * headDim];
  const sizes: [keyof Names, dIn: number, dOut: number][] = [
    ['q', dModel, qkv === 'separate' ? dQ : 3 * dQ],
    ['k', dModel, dKv],
    ['v', dModel, dKv],
    ['o', dQ, dModel],
    ['gate', dModel, dMlp],
    ['up', dModel, dMlp],
    ['down', dMlp, dModel],
  ];
  const present = sizes.filter(([part]) => arch.names[part]);
  const ofBlock = (i: number) =>
    present.map(([part, dIn, dOut]) => ({ path: nameOf(arch, part, i), dIn, dOut }));
  return range(0, nLayers).flatMap(ofBlock);
}

/** Loads a Hugging Face folder. @throws UsageError */
export async function loadTarget(dir: string, from: Origin = { path: dir }) {
  await openRooms();
  const files = await io.openModel(dir, NAMES, say);
  const { arch, config } = files;
  const { names, conv1d, vocab, dModel } = arch;
  const linears = linearLayers(arch);
  const weights = new Map<string, tf.Variable>();
  const keep = (name: string, shape: number[], key = name, transposed = false) =>
    weights.set(key, makeVariable(files.read(name, shape), shape, transposed));
  const keepBias = (name: string, d: number) => files.has(name) && keep(name, [d]);
  const load = (name: string, shape: number[]) => {
    keep(`${name}.weight`, shape);
    keepBias(`${name}.bias`, dModel); // a norm's
  };
  try {
    load(names.embed, [vocab, dModel]);
    if (names.positions) load(names.positions, [arch.context, dModel]);
    // Linear layers are kept as Wᵀ: no product has to transpose them.
    for (const { path: name, dIn, dOut } of linears) {
      keep(`${name}.weight`, conv1d ? [dIn, dOut] : [dOut, dIn], name, !conv1d);
      keepBias(`${name}.bias`, dOut);
    }
    for (const i of range(0, arch.nLayers)) {
      for (const part of ['norm1', 'norm2'] as const) load(nameOf(arch, part, i), [dModel]);
      for (const part of ['qNorm', 'kNorm'] as const)
        if (names[part]) load(nameOf(arch, part, i), [arch.headDim]);
    }
    load(names.last, [dModel]);
    if (files.has(`${names.head}.weight`)) load(names.head, [vocab, dModel]);
    else if (!arch.tied) refuse(`${dir}: no ${names.head}, and tie_word_embeddings is false`);
    const source = { ...from, type: arch.type, sha256: files.finish() };
    return languageModel({ arch, linears, weights, dir, config, source });
  } finally {
    files.close();
  }
}

type Network = Pick<LanguageModel, 'arch' | 'linears' | 'weights'>;
export const languageModel = <X extends Network>(network: X) => ({
  ...network,
  compare: kl,
  nextToken: true,
  forward: (tokens: T<'B S'>, linear: Linear) => decoder(network, tokens, linear),
});

export const makeVariable = (data: Float32Array, shape: number[], transposed = false) =>
  tf.tidy((): tf.Variable => {
    const stored = tf.tensor(data, shape);
    return tf.variable(transposed ? stored.transpose() : stored, /* trainable */ false);
  });
const sizeOf = (shape: number[]) => shape.reduce((n, d) => n * d, 1);

/** The exact GELU, x Φ(x). */
const gelu = (x: T): T => tf.mul(0.5, x).mul(x.mul(Math.SQRT1_2).erf().add(1));
/** ½ x (1 + tanh t) = x σ(2t), t = √(2/π) (x + 0.044715 x³). */
const geluTanh = (x: T): T => {
  const u = x.square().mul(0.044715).add(1).mul(x);
  return x.mul(u.mul(Math.sqrt(8 / Math.PI)).sigmoid());
};
const ACTIVATIONS = {
  silu: (x: T): T => x.mul(x.sigmoid()),
  relu: (x: T): T => x.relu(),
  gelu,
  gelu_new: geluTanh,
  gelu_pytorch_tanh: geluTanh,
};

/**
 * y = x r with r = 1 / √(mean x² + ε), over the last axis. The gradient is made by hand, with
 * a third of TFJS's ops: dx = r (dy − y mean(y dy)).
 */
export const rmsNormalize = (x: T, eps: number): T =>
  tf.customGrad((a, save) => {
    const r = (a as T).square().mean(-1, true).add(eps).rsqrt();
    const y = (a as T).mul(r);
    (save as tf.GradSaveFunc)([y, r]);
    const gradFunc = (dy: T, [y, r]: T[]) => r!.mul(dy.sub(y!.mul(y!.mul(dy).mean(-1, true))));
    return { value: y, gradFunc };
  })(x);

function normalise(net: Network, name: string, x: T<'N d'>): T<'N d'> {
  const { norm, eps } = net.arch;
  const centred = norm === 'layer' ? x.sub(x.mean(-1, true)) : x;
  const scaled = rmsNormalize(centred, eps).mul(weightOf(net, `${name}.weight`));
  return addBias(scaled, net.weights.get(`${name}.bias`));
}

/** RoPE's inverse wavelengths, one for each rotated pair. */
const inverseWavelengths = (headDim: number, base: number): Float32Array =>
  Float32Array.from(range(0, headDim / 2), i => base ** ((-2 * i) / headDim));

/** RoPE, half-split: rotates the first 2·len(frequencies) dimensions of each head. */
export function rotate(x: T<'B H S hd'>, frequencies: Float32Array): T<'B H S hd'> {
  const [S = 0, headDim = 0] = x.shape.slice(2);
  const half = frequencies.length;
  const position = tf.range(0, S, 1, 'float32').reshape([S, 1]);
  const angle: T<'S half'> = position.mul(tf.tensor2d(frequencies, [1, half]));
  const [cos, sin] = [angle.cos(), angle.sin()];
  const sizes = [half, half, headDim - 2 * half].filter(size => size > 0);
  const [a, b, ...others] = tf.split(x, sizes, 3) as [T, T, ...T[]];
  return tf.concat([a.mul(cos).sub(b.mul(sin)), b.mul(cos).add(a.mul(sin)), ...others], 3);
}

export const toHeads = (x: T<'N d'>, B: number, S: number, H: number): T<'B H S hd'> =>
  x.reshape([B, S, H, x.size / (B * S * H)]).transpose([0, 2, 1, 3]);

/** softmax(q kᵀ / √hd) v for q [B,H,S,hd] and k, v [B,H',S,hd], H' a divisor of H. */
function attend(q: T, k: T, v: T, causal: boolean): T<'N d'> {
  const [B = 0, H = 0, S = 0, headDim = 0] = q.shape;
  const kvHeads = k.shape[1]!;
  // Grouped queries: the q heads that share a k are stacked as rows.
  const rows = (H / kvHeads) * S;
  const scaled = q.mul(1 / Math.sqrt(headDim)).reshape([B, kvHeads, rows, headDim]);
  let scores: T = tf.matMul(scaled, k, false, true).reshape([B, H, S, S]);
  if (causal) {
    const position = tf.range(0, S, 1, 'float32');
    const later = indicator(position.reshape([1, S]).greater(position.reshape([S, 1])));
    scores = scores.add(later.mul(-1e9));
  }
  const mixed: T = tf.matMul(scores.softmax().reshape([B, kvHeads, rows, S]), v);
  const heads = mixed.reshape([B, H, S, headDim]).transpose([0, 2, 1, 3]);
  return heads.reshape([B * S, H * headDim]);
}

type At = (part: keyof Names) => string;
/** The attention of one block; `at`: the paths of its layers. */
function attention(net: Network, at: At, h: T<'N d'>, S: number, linear: Linear): T<'N d'> {
  const { qkv, nHeads, nKvHeads, names, rotary } = net.arch;
  const N = h.shape[0]!;
  // Fused layers give [N,3·dQ]: all q, all k, all v, or ('by head') those of one head after another.
  let [q, k, v]: (T | undefined)[] = [linear(at('q'), h)];
  if (qkv === 'separate') [k, v] = [linear(at('k'), h), linear(at('v'), h)];
  else if (qkv === 'concatenated') [q, k, v] = tf.split(q!, 3, 1);
  else [q, k, v] = tf.split(q!.reshape([N, nHeads, -1]), 3, 2);
  const heads = (x: T, H: number, norm?: 'qNorm' | 'kNorm') => {
    const split = toHeads(x, N / S, S, H);
    const normed = norm && names[norm] ? normalise(net, at(norm), split) : split;
    return norm && rotary ? rotate(normed, rotary) : normed;
  };
  const [queries, keys] = [heads(q!, nHeads, 'qNorm'), heads(k!, nKvHeads, 'kNorm')];
  return linear(at('o'), attend(queries, keys, heads(v!, nKvHeads), true));
}

function decoder(net: Network, tokens: T<'B S'>, linear: Linear): T<'N vocab'> {
  const { names, dModel, activation, parallelResidual, nLayers } = net.arch;
  const [B = 0, S = 0] = tokens.shape;
  const embedding = weightOf(net, `${names.embed}.weight`);
  let x: T<'N d'> = tf.gather(embedding, tokens.flatten());
  if (names.positions) {
    const positions = tf.slice(weightOf(net, `${names.positions}.weight`), [0, 0], [S, dModel]);
    x = tf.add(x.reshape([B, S, dModel]), positions).reshape([B * S, dModel]);
  }
  const act = ACTIVATIONS[activation];
  for (const i of range(0, nLayers)) {
    const at: At = part => nameOf(net.arch, part, i);
    const attended = x.add(attention(net, at, normalise(net, at('norm1'), x), S, linear));
    const h = normalise(net, at('norm2'), parallelResidual ? x : attended);
    const up = linear(at('up'), h);
    const hidden = names.gate ? act(linear(at('gate'), h)).mul(up) : act(up);
    x = attended.add(linear(at('down'), hidden));
  }
  const head = net.weights.get(`${names.head}.weight`) ?? embedding;
  return matmul(normalise(net, names.last, x), head, true);
}

// ---- K. Data ----

/**
 * Rows of one length: tokens (Int32Array), or features position after position (Float32Array).
 * Count Infinity: every row is new, they are read in order.
 */
export interface Rows {
  count: number;
  seqLen: number; // S; 1 for a network without sequences
  row(i: number): Int32Array | Float32Array;
}
export const firstRows = (rows: Rows, n: number): Rows => {
  return { ...rows, count: Math.min(n, rows.count) };
};

export type Data = { train: Rows; heldOut: Rows; tokenizer?: Tokenizer | undefined };

/** Rows as a batch of inputs: tokens [B,S] (int32), or features [B,S,·]. */
export function inputBatch({ seqLen, row }: Rows, indices: number[]): tf.Tensor {
  const rows = indices.map(row);
  const [B, width, tokens] = [rows.length, rows[0]!.length, rows[0] instanceof Int32Array];
  const all = new (tokens ? Int32Array : Float32Array)(B * width);
  for (const [i, values] of rows.entries()) all.set(values, i * width);
  if (tokens) return tf.tensor2d(all, [B, seqLen], 'int32');
  return tf.tensor3d(all, [B, seqLen, width / seqLen]);
}

/** The rows of one training step: each epoch is a new shuffle, by (seed, epoch) alone. */
export function batchIndices(count: number, size: number, step: number, seed: number) {
  const places = range(step * size, (step + 1) * size);
  if (count === Infinity) return places;
  return places.map(at => shuffled(count, seed, Math.floor(at / count))[at % count]!);
}
let cache = { key: '', order: new Uint32Array() }; // of the last epoch
function shuffled(count: number, seed: number, epoch: number) {
  const key = `${count},${seed},${epoch}`;
  if (cache.key === key) return cache.order;
  const order = new Uint32Array(count).map((_, i) => i);
  const draws = uniformArray(count, seed, epoch, PURPOSE.shuffle);
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(draws[i]! * (i + 1)); // Fisher-Yates
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  cache = { key, order };
  return order;
}

export async function loadData(model: LanguageModel, config: Config) {
  const tokenizer = io.loadTokenizer(model.dir);
  return { tokenizer, ...(await io.rowsOf(config, model, tokenizer)) };
}

// Random numbers are a function of (seed, step, purpose) alone: no generator has a state to save.

// biome-ignore format: few lines
export const PURPOSE = {
  mask: 1, delta: 2, route: 3, routeCount: 4, randomMask: 5, pgd: 6, shuffle: 7, sources: 8,
  harvest: 9, init: 16, // and on, one for each array of initial values
};

export const randomKey = (seed: number, step: number) =>
  tf.tensor1d([scramble(seed), step], 'int32');

/** Uniform numbers in [0, 1) by (key, purpose). An engine may have its own, with other bits. */
export function uniform(shape: number[], key: T, purpose: number): T {
  if (tf.getKernel('Uniform', tf.getBackend())) {
    const attrs = { shape, purpose, generate: uniformArray as never };
    return tf.engine().runKernel('Uniform', { key }, attrs) as T;
  }
  const [seed = 0, step = 0] = key.dataSync();
  return tf.tensor(uniformArray(sizeOf(shape), seed, step, purpose), shape);
}

/** The generator sfc32, 24 bits a number. */
export function uniformArray(n: number, seed: number, step: number, purpose: number) {
  // (seed, step, purpose) → (a, b, c) is one-to-one: no two keys give the same numbers.
  let a = scramble(seed);
  let b = scramble(a ^ step);
  let c = scramble(b ^ purpose);
  let counter = 1;
  const out = new Float32Array(n);
  // Twelve rounds first spread the key's bits over the state.
  for (let i = -12; i < n; i++) {
    const t = (a + b + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + t) | 0;
    if (i >= 0) out[i] = (t >>> 8) * 2 ** -24;
  }
  return out;
}
/** MurmurHash3's finaliser: it permutes the 32-bit numbers. */
export function scramble(x: number) {
  let h = (x + 0x9e3779b9) | 0;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return h ^ (h >>> 16);
}

// ---- L. Rooms ----
// engine/ makes TFJS fast, io/ stands between this file and the world. Without them the plain ways
// below do: op by op, from llama and llama_simple_mlp folders and .txt files to
// components.safetensors.

export interface Engine {
  name: string;
  gpu: boolean;
  description: string; // which, and why
  memoryBytes?(): number; // how much a step may take
  /**
   * `fn`, which may be traced into a graph at its first call: what changes from call to call
   * enters through `feeds`, no branch depends on a tensor's value, and what lives on is a
   * tf.Variable, which `fn` may assign.
   */
  compile<F extends Tensors, O extends Tensors>(
    name: string,
    fn: (feeds: F) => O,
  ): (feeds: F) => Promise<O>;
}
export const opByOp: Pick<Engine, 'compile'> = {
  compile: (_name, fn) => async feeds => tf.tidy(() => fn(feeds)),
};
export async function startEngine(config: Config): Promise<Engine> {
  await openRooms();
  return { ...opByOp, ...(await engines.startEngine(config)) };
}

/** tf.tidy for an async function. It is not re-entrant. */
export async function tidyAsync<X>(job: () => Promise<X>) {
  tf.engine().startScope();
  try {
    return await job();
  } finally {
    tf.engine().endScope();
  }
}
export const numbers = async (x: T) => (await x.data()) as Float32Array;
export async function scalars(tensors: Tensors): Promise<Metrics> {
  const values = await Promise.all(Object.values(tensors).map(numbers));
  return Object.fromEntries(Object.keys(tensors).map((name, i) => [name, values[i]![0]!]));
}

/** The module of a folder beside this file. */
const beside = async <X>(folder: string, load: () => Promise<X>): Promise<X | undefined> =>
  fs.existsSync(new URL(`${folder}/index.ts`, import.meta.url)) ? load() : undefined;
const needsRoom = (): never => refuse('this needs the folders io/ and engine/ beside the file');
/** The plain ways of a room; whatever else is asked of it is refused. */
const alone = <X extends object>(plain: Partial<X>) =>
  new Proxy(plain, { get: (_, name) => Reflect.get(plain, name) ?? needsRoom }) as X;

type Io = typeof import('./io/index.ts');
const plainIo: Partial<Io> = {
  /** Flags of the main job, as --name=value. */
  commandLine(argv) {
    const values: Record<string, string | number | boolean> = {};
    for (const arg of argv) {
      const [, no, flag = '', raw] = /^--(no-)?([\w-]+)(?:=(.+))?$/s.exec(arg) ?? [];
      const name = flag.replace(/-(.)/g, (_, letter) => letter.toUpperCase());
      const { value: usual, min, max } = FIELDS[name as 'seed'] ?? {};
      const value = typeof usual === 'number' ? Number(raw ?? Number.NaN) : no ? false : raw;
      const inside = typeof value !== 'number' || (value >= min && value <= max);
      if (!Object.hasOwn(FIELDS, name) || typeof value !== typeof usual || !inside)
        refuse(`${arg}: without io/ takes --name=value, one of ${Object.keys(FIELDS).join(' ')}`);
      values[name] = value!;
    }
    values.out ||= `runs/${path.basename(`${values.model}`)}-${Date.now()}`;
    return { job: 'decompose', values, flags: {}, meantFor: {}, sizes: () => ({}), old: undefined };
  },
  /** A plain Llama or the paper's own model: one safetensors file, which is trusted. */
  async openModel(dir) {
    const [configFile, file] = [path.join(dir, 'config.json'), path.join(dir, 'model.safetensors')];
    const config = readJson(configFile);
    const bytes = fs.existsSync(file) ? fs.readFileSync(file) : refuse(`${file}: no such file`);
    const sha256 = crypto.createHash('sha256').update(fs.readFileSync(configFile));
    // A safetensors file is the header's length in 8 bytes, the header (JSON), the tensors' bytes.
    const start = 8 + Number(bytes.readBigUInt64LE());
    const header = JSON.parse(bytes.toString('utf8', 8, start));
    return {
      arch: plainArchitecture(config, configFile) as never,
      config,
      has: name => Object.hasOwn(header, name),
      read(name, shape) {
        const { dtype, shape: got, data_offsets } = header[name] ?? refuse(`${file}: no ${name}`);
        if (`${got}` !== `${shape}`) refuse(`${file}: ${name} is [${got}], not [${shape}]`);
        if (dtype !== 'F32' && dtype !== 'BF16') refuse(`${file}: ${dtype} needs the folder io/`);
        const [begin, end] = data_offsets.map((offset: number) => start + offset);
        const raw = new Uint8Array(bytes.subarray(begin, end)).buffer; // a copy: aligned
        const bits = () => new Uint32Array(new Uint16Array(raw)).map(upper => upper << 16);
        const data = new Float32Array(dtype === 'F32' ? raw : bits().buffer);
        sha256.update(name).update(data);
        return data;
      },
      finish: () => sha256.digest('hex'), // of all that was read
      close: () => {},
    };
  },
  /** Rows of one text file, a document a line. */
  async rowsOf({ data, evalData, seqLen }, { config }, tokenizer) {
    if (!tokenizer || !data.endsWith('.txt') || evalData || !fs.existsSync(data))
      return refuse(`${data}: without io/ takes one .txt file`);
    const lines = fs.readFileSync(data, 'utf8').split('\n');
    const documents = lines.filter(line => line.trim());
    // Documents are joined by end-of-text, unless the tokenizer starts each with begin-of-text.
    const marksItself = tokenizer.encode('').ids.length > 0;
    const mark = marksItself ? [] : ([config.eos_token_id ?? []].flat().slice(0, 1) as number[]);
    const pack = (texts: string[]) => {
      const ids = texts.flatMap(text => [...tokenizer.encode(text).ids, ...mark]);
      const row = (i: number) => Int32Array.from(ids.slice(i * seqLen, (i + 1) * seqLen));
      return { count: Math.floor(ids.length / seqLen), seqLen, row };
    };
    const border = Math.floor(0.95 * documents.length);
    const [train, heldOut] = [pack(documents.slice(0, border)), pack(documents.slice(border))];
    if (train.count && heldOut.count) return { train, heldOut };
    return refuse(`${data}: too short for rows of ${seqLen} tokens`);
  },
  async saveCheckpoint(dir, _step, components) {
    const header: Record<string, object> = {};
    let end = 0;
    for (const [name, { shape, size }] of Object.entries(components)) {
      header[name] = { dtype: 'F32', shape, data_offsets: [end, end + 4 * size] };
      end += 4 * size;
    }
    const start = Buffer.from(`${' '.repeat(8)}${JSON.stringify(header)}`);
    start.writeBigUInt64LE(BigInt(start.length - 8));
    const data = await Promise.all(Object.values(components).map(numbers));
    const bytes = data.map(x => Buffer.from(x.buffer, x.byteOffset, x.byteLength));
    fs.writeFileSync(path.join(dir, 'components.safetensors'), Buffer.concat([start, ...bytes]));
  },
  resolveModel: async dir => ({ dir }),
  loadTokenizer: dir => new Tokenizer(readJson(path.join(dir, 'tokenizer.json')), {}),
  startProgress: total => (done, line) => {
    if (done === total || Number.isInteger(Math.log2(done))) say(line());
  },
  watchSignals: () => ({ interrupted: async () => undefined, stop: () => {} }),
  async checkFinite(step, metrics) {
    if (!Object.values(metrics).every(Number.isFinite)) throw new Error(`diverged at step ${step}`);
  },
  runRecord: ({ problem: { config } }) => ({ formatVersion: 1, config }) as never,
  readMetrics: () => [],
  stepLine: (done, nSteps) => `step ${done}/${nSteps}`,
  describeRun: () => {},
  warnOfTarget: () => {},
  endLiveLine: () => {},
};
type Engines = typeof import('./engine/index.ts');
const plainEngines: Partial<Engines> = {
  async startEngine({ engine, precision }) {
    if (!['auto', 'wasm'].includes(engine) || !['auto', 'float32'].includes(precision))
      refuse(`--engine ${engine}, --precision ${precision}: not without the folder engine/`);
    await import('@tensorflow/tfjs-backend-wasm');
    await tf.setBackend('wasm');
    const description = 'WASM, op by op (no engine/ folder)';
    return { name: 'wasm', gpu: false, description, memoryBytes: () => Infinity };
  },
  checkSize: () => {},
};
let io: Io = alone(plainIo);
let engines: Engines = alone(plainEngines);
/** Takes the rooms in; whatever starts here awaits it. */
async function openRooms() {
  io = (await beside('io', () => import('./io/index.ts'))) ?? io;
  engines = (await beside('engine', () => import('./engine/index.ts'))) ?? engines;
}

function readJson(file: string): Record<string, unknown> {
  try {
    return JSON.parse(fs.readFileSync(file, 'utf8'));
  } catch (error) {
    return refuse(`${file}: ${(error as Error).message}`);
  }
}

// biome-ignore lint/suspicious/noExplicitAny: fields of a config.json
export function plainArchitecture(config: Record<string, any>, file: string): Architecture {
  const { model_type: type, num_attention_heads: nHeads, hidden_size: dModel } = config;
  const other = (what: string) => refuse(`${file}: ${what} needs the folder io/`);
  if (!Object.hasOwn(NAMES, type)) other(`model_type ${type}`);
  const names: Names = NAMES[type as keyof typeof NAMES];
  const activation = config.hidden_act ?? (names.gate ? 'silu' : 'gelu_new');
  if (!Object.hasOwn(ACTIVATIONS, activation)) other(`hidden_act ${activation}`);
  for (const field of ['rope_scaling', 'rope_parameters']) if (config[field]) other(field);
  const headDim = config.head_dim ?? dModel / nHeads;
  // biome-ignore format: few lines
  return {
    type, names, activation, dModel, nHeads, headDim,
    nKvHeads: config.num_key_value_heads ?? nHeads, vocab: config.vocab_size,
    dMlp: config.intermediate_size, nLayers: config.num_hidden_layers,
    context: config.max_position_embeddings ?? 2048, contextField: 'max_position_embeddings',
    norm: 'rms', eps: config.rms_norm_eps ?? 1e-6, qkv: 'separate', conv1d: false,
    rotary: inverseWavelengths(headDim, config.rope_theta ?? 10_000),
    parallelResidual: false, tied: config.tie_word_embeddings ?? type === 'llama_simple_mlp',
  };
}

// ---- M. Command line ----
// Exit codes: 0, 1 failed, 2 bad input, 130 or 143 interrupted.

/** Fills in what is "auto", checks fields against each other. `given`: those set on purpose. */
export function resolveConfig(
  config: Config,
  sizes: Pick<Architecture, 'dModel' | 'nLayers' | 'context' | 'contextField'>,
  given: Set<string>,
  gpu: boolean,
): Config {
  const c = { ...config };
  if (!given.has('batchSize') && !gpu) c.batchSize = 2;
  if (!given.has('seqLen')) c.seqLen = Math.min(c.seqLen, sizes.context);
  const width = (sizes.dModel * 8) / 3;
  c.ciNHeads ||= Math.min(16, Math.max(4, Math.round(width / 64)));
  c.ciDModel ||= Math.max(1, Math.round(width / (8 * c.ciNHeads))) * 8 * c.ciNHeads;
  c.ciNBlocks ||= 2 * sizes.nLayers;
  c.ciMlpHidden ||= 4 * c.ciDModel;
  c.evalBatchSize ||= c.batchSize;
  const { batchSize, microBatches, ciDModel, ciNHeads, seqLen } = c;
  if (batchSize % microBatches !== 0)
    refuse(`--micro-batches ${microBatches} does not divide --batch-size ${batchSize}`);
  if (ciDModel % (2 * ciNHeads) !== 0)
    refuse(`--ci-d-model ${ciDModel} is no even number for each of ${ciNHeads} --ci-n-heads`);
  if (seqLen > sizes.context)
    refuse(`--seq-len ${seqLen}: the target's ${sizes.contextField} is ${sizes.context}`);
  return c;
}

/**
 * Opens what a config names; to train: `sizes` are fields that follow the target's. Its own loss
 * reveals a wrongly loaded model.
 */
async function openModelRun(
  config: Config,
  given: Set<string>,
  sizes?: (target: LanguageModel) => Partial<Config>,
) {
  if (!config.model) refuse('--model: missing; takes a folder or a hub id (or a --preset)');
  if (!config.data) refuse('--data: missing; takes .txt, .jsonl, .json, .parquet or a hub id');
  const engine = await startEngine(config);
  say(`engine   ${engine.description}`);
  const { dir, commit } = await io.resolveModel(config.model);
  const target = await loadTarget(dir, { path: config.model, ...(commit && { commit }) });
  const c = resolveConfig({ ...config, ...sizes?.(target) }, target.arch, given, engine.gpu);
  const data = await loadData(target, c);
  c.seqLen = data.train.seqLen;
  const modules = chooseModules(target.linears, c.components);
  const problem: Problem<LanguageModel> = { target, modules, config: c };
  io.describeRun(problem, data, say);

  const rows = firstRows(data.heldOut, Math.max(c.evalBatchSize, Math.ceil(8192 / c.seqLen)));
  let loss = 0;
  for (const indices of inBatches(rows.count, c.evalBatchSize))
    loss += await tidyAsync(async () => {
      const tokens = inputBatch(rows, indices);
      const logits = target.forward(tokens, ownLinear(target));
      const [mean = 0] = await numbers(crossEntropy(logits.logSoftmax(), tokens));
      return (mean * indices.length) / rows.count;
    });
  say(`loss     ${loss.toFixed(4)} nats per token, its own on ${rows.count} held-out rows`);
  const ciShapes = ciTransformer.shapes(problem);
  if (sizes) engines.checkSize({ ...problem, arch: target.arch, ciShapes }, engine, say);
  return { engine, problem, params: initialParams(problem), data };
}

/**
 * A finished run on a language model. `changes`: to its config. @throws UsageError if model or data
 * are not those of the run
 */
export async function openRun(dir: string, changes: Partial<Config> = {}) {
  await openRooms();
  const record = io.readRecord(dir) as RunRecord;
  const { evalBatchSize } = record.config; // it may decide how much of a hub's data set is read
  const config = { ...DEFAULTS, ...record.config, ...changes, evalBatchSize, out: dir };
  const run = await openModelRun(config, new Set(Object.keys(config)));
  run.problem.config.evalBatchSize = changes.evalBatchSize ?? evalBatchSize;
  if (run.problem.target.source.sha256 !== record.model.sha256)
    refuse(`${record.model.path}: not the model of this run (its SHA-256 differs)`);
  const onPurpose = Boolean(changes.data || changes.evalData);
  const otherData = io.compareData(record.data, recordOf(run).data, onPurpose, say);
  await io.restore(path.join(dir, 'components.safetensors'), run.params);
  return { ...run, record, otherData };
}

export type OpenRun = Awaited<ReturnType<typeof openRun>>;
export type Flags = Record<string, string | boolean | undefined>;
/** A command on a finished run; its flags are those besides the config's. */
export interface Job {
  help: string;
  flags?: Record<string, 'string' | 'boolean'>;
  run(dir: string, changes: Partial<Config>, flags: Flags): Promise<number>; // the exit code
}

/** Jobs on finished runs, and what follows on a training. */
interface Postprocess {
  JOBS: Record<string, Job>;
  prepare?(run: Run): void; // may refuse a run
  measures?: Measures;
  finish(run: Run, metrics: Metrics): Promise<void>;
}
const plainPostprocess: Postprocess = {
  JOBS: {},
  async finish(run, metrics) {
    console.log(metrics);
    const { harvest, out } = run.problem.config;
    const file = path.join(out, 'harvest.json');
    if (harvest) writeAtomic(file, JSON.stringify(await shortHarvest(run)));
  },
};

/** One line without control or direction marks: it may quote a stranger's file. */
const oneLine = (error: unknown) =>
  (error as Error).message.slice(0, 500).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '?');

/** @returns the exit code */
export async function main(argv: string[], post = plainPostprocess) {
  await openRooms();
  const line = io.commandLine(argv, { version: VERSION, groups: GROUPS, jobs: post.JOBS });
  if (!line) return 0; // --help, --version
  const { job, flags, meantFor, sizes } = line;
  const given: Partial<Config> = line.values;
  if (job !== 'decompose') return post.JOBS[job]!.run(`${flags.run}`, given, flags);
  const old = line.old as RunRecord | undefined;
  const config = { ...DEFAULTS, ...given };
  const { out } = config;
  if (!old && fs.existsSync(path.join(out, 'config.json')))
    refuse(`${out}: holds a run; --resume goes on with it, or take another --out`);
  const run: Run<LanguageModel> = await openModelRun(config, new Set(Object.keys(given)), sizes);
  const { engine, problem, params, data } = run;
  io.warnOfTarget(problem.target.arch, meantFor, say);
  if (flags['dry-run']) {
    const step = compileStep(engine, problem, initialState(problem, params));
    await io.dryRun(run, flags, async n => void (await step(n, data.train)));
    return 0;
  }
  post.prepare?.(run);
  const { interrupted, stop } = io.watchSignals(say);
  try {
    const metrics = await decompose(run, { old, stopped: interrupted, measures: post.measures });
    if (!metrics) {
      say(`stopped; go on with --resume --out ${out}`);
      return (await interrupted()) ?? 1;
    }
    await post.finish(run, metrics);
  } catch (error) {
    if (!run.trained) throw error;
    say(`nano-param-decomp: ${oneLine(error)}; it is saved: go on with --resume --out ${out}`);
    return 1;
  } finally {
    stop();
  }
  const peak = (process.resourceUsage().maxRSS / 2 ** 20).toFixed(2);
  console.log(`\nRun folder: ${out}   peak memory: ${peak} GiB`);
  return 0;
}

if (process.argv[1] && fs.realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const failed = (error: NodeJS.ErrnoException) => {
    // A full disk is no bug: its stack tells nothing.
    const known = /^E[A-Z]+$|^(Usage|Divergence)Error$/.test(error.code ?? error.name);
    say(known ? `nano-param-decomp: ${oneLine(error)}` : String(error.stack));
    return error.name === 'UsageError' ? 2 : 1;
  };
  // Not awaited: postprocess/ imports this file, which has to be loaded by then.
  beside('postprocess', () => import('./postprocess/index.ts'))
    .then(post => main(process.argv.slice(2), post))
    .catch(failed)
    .then(code => Object.assign(process, { exitCode: code }));
}
