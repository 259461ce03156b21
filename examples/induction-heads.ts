/**
 * Induction heads: an attention-only network of two layers with one head each, which answers "what came after S before?".
 * A row is 64 random tokens; early in it stands the pair (S, M), S is one fixed token, and the row ends in S again: predict
 * M. The known solution takes two heads: in layer 0 a head by which the token after S learns that S is before it
 * (previous token), in layer 1 one by which the last S finds that token and copies it (induction).
 *
 * What must be found: few components, at the two places that do the work: layer 0 at M, layer 1 at the last S (q, o) and
 * at M (k, v). How it is marked: the accuracy under CI masks and under a fresh adversary's; and what is left when only
 * those components are deleted, beside as many others, with the attention of both heads as a picture.
 *
 *   npx tsx examples/induction-heads.ts [--seed N] [--steps N] [--out DIR --page]
 */
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import {
  type Config,
  decompose,
  importances,
  inputBatch,
  interpolate,
  kl,
  type Linear,
  type Masks,
  makeVariable,
  maskedForward,
  maskedLinear,
  matmul,
  newRun,
  numbers,
  ownLinear,
  pgdStep,
  type Rows,
  range,
  sum,
  type T,
  type Target,
  toHeads,
  totalC,
  uniformArray,
} from '../nano-param-decomp.ts';
import { finish } from '../postprocess/index.ts';
import { normal, optionsOf, trainTarget } from './lesson.ts';

const TRY = JSON.parse(process.env.TRY ?? '{}');
const options = optionsOf(process.argv.slice(2), 'layers', ['2'], 3000);
const { seed, threads, out } = options;
const started = performance.now();
const [D, RANDOM, BEGIN, S, VOCAB, LENGTH] = [16, 128, 128, 129, 130, 64];

/** Rows: begin, random tokens with (S, M) in the first half, S. */
const rows = (seqLen: number, first: number): Rows => ({
  count: Number.POSITIVE_INFINITY,
  seqLen,
  row(i) {
    const draws = uniformArray(seqLen + 1, seed, first + i, 1001);
    const tokens = Int32Array.from({ length: seqLen }, (_, k) => Math.floor(draws[k]! * RANDOM));
    tokens[0] = BEGIN;
    tokens[1 + Math.floor(draws[seqLen]! * (seqLen / 2 - 2))] = S;
    tokens[seqLen - 1] = S;
    return tokens;
  },
});
const placeOfM = (row: ArrayLike<number>) => Array.from(row).indexOf(S) + 1;

// The target: embedding, two layers of q, k, v, o, unembedding. Sinusoidal positions are added to q and k.
const linears = [0, 1].flatMap(l => [...'qkvo'].map(p => ({ path: `layers.${l}.${p}`, dIn: D, dOut: D })));
const matrix = (dIn: number, dOut: number, purpose: number) =>
  makeVariable(normal(dIn * dOut, 1 / Math.sqrt(dIn), seed, purpose), [dIn, dOut]);
const embed = makeVariable(normal(VOCAB * D, 1, seed, 1), [VOCAB, D]);
const unembed = matrix(D, VOCAB, 2);
const weights = new Map(linears.map(({ path, dIn, dOut }, i) => [path, matrix(dIn, dOut, 3 + i)]));
const sinusoids = (length: number) =>
  tf.tensor2d(
    range(0, length).map(s =>
      range(0, D).map(i => Math.sin(s / 10_000 ** ((i >> 1) / (D / 2)) + (i % 2) * (Math.PI / 2))),
    ),
  );
/** The logits at the last position [B,VOCAB], and the attention of both layers [B,S,S]. */
function network(tokens: T<'B S'>, linear: Linear) {
  const [B = 0, length = 0] = tokens.shape;
  let x: T<'N d'> = matmul(tf.oneHot(tokens.flatten() as tf.Tensor1D, VOCAB).cast('float32'), embed);
  const position = tf.range(0, length, 1, 'float32');
  const later = position
    .reshape([1, length])
    .greater(position.reshape([length, 1]))
    .cast('float32')
    .mul(-1e9);
  const places = sinusoids(length);
  const attention = [0, 1].map(l => {
    const project = (p: string) => linear(`layers.${l}.${p}`, x).reshape([B, length, D]);
    const scores = tf.matMul(project('q').add(places), project('k').add(places), false, true).mul(1 / Math.sqrt(D));
    const pattern = scores.add(later).softmax();
    x = x.add(linear(`layers.${l}.o`, tf.matMul(pattern, project('v')).reshape([B * length, D])));
    return pattern;
  });
  const last = tf.slice(x.reshape([B, length, D]), [0, length - 1, 0], [B, 1, D]).reshape([B, D]);
  return { logits: matmul(last, unembed), attention };
}
const target: Target = { linears, weights, compare: kl, forward: (tokens, linear) => network(tokens, linear).logits };
/** M of each row: the token that follows the first S. */
const answers = (tokens: T<'B S'>): tf.Tensor1D => {
  const [B = 0, length = 0] = tokens.shape;
  const before = tf
    .slice(tokens, [0, 0], [B, length - 1])
    .equal(S)
    .cast('int32');
  return before
    .mul(tf.slice(tokens, [0, 1], [B, length - 1]))
    .sum(1)
    .cast('int32') as tf.Tensor1D;
};
const loss = (tokens: T) =>
  target
    .forward(tokens, ownLinear(target))
    .logSoftmax()
    .mul(tf.oneHot(answers(tokens), VOCAB))
    .sum()
    .div(-tokens.shape[0]!);
const all = new Map([...weights, ['embed', embed], ['unembed', unembed]]);
// Short rows first: the heads form there at a fraction of the cost, and then learn to look further.
const stages = (
  TRY.stages ?? [
    [12, 256, 6000, 5e-3],
    [32, 128, 1500, 3e-3],
    [LENGTH, 128, 1500, 3e-3],
  ]
).map(([length, batch, steps, lr]: number[]) => ({
  rows: rows(length!, 0),
  batch: batch!,
  steps: steps!,
  lr: lr!,
  finalFrac: length === LENGTH ? 0.01 : 0.5,
}));
const file = process.env.CACHE
  ? path.join(process.env.CACHE, `ind-${seed}.json`)
  : out && path.join(out, 'target.json');
await trainTarget(all, loss, stages, { threads, file });

const held = rows(LENGTH, 2 ** 30);
const testTokens = inputBatch(held, range(0, 512));
/** The share of right answers. */
const accuracy = async (logits: (tokens: T) => T) => {
  const right = tf.tidy(() => logits(testTokens).argMax(1).equal(answers(testTokens)).cast('float32').mean());
  return (await numbers(right))[0]!;
};
const targetAccuracy = await accuracy(tokens => target.forward(tokens, ownLinear(target)));
console.error('target accuracy', targetAccuracy);
if (TRY.targetOnly) process.exit(0);

const config: Partial<Config> = {
  ...{ out, seed, threads, nSteps: options.steps, batchSize: 32, components: '*=32', xla: 'off' },
  ...{ mainLr: 2e-3, gradClipComponents: 0, coeffFaith: 1e3, coeffImp: 2e-4, pStart: 1, pEnd: 0.5, impBeta: 0.5 },
  ...{ ciDModel: 64, ciNBlocks: 1, ciMlpHidden: 128, ppgdInnerSteps: 1, evalFreq: 0, saveEvery: 0, harvestRows: 256 },
  ...TRY.config,
};
const run = await newRun(target, { train: rows(LENGTH, 2 ** 29), heldOut: held }, config);
const metrics = (await decompose(run))!;
await finish(run, metrics);

// The marks. Accuracy under masks:
const { problem, params } = run;
const M = problem.modules.length;
const sumC = totalC(problem.modules);
const masked = (masks: (g: T) => Masks) =>
  accuracy(tokens => maskedForward(problem, params, tokens, masks(importances(problem, params, tokens).g)));
let source: T = tf.tensor2d(uniformArray(sumC + M, seed, 0, 1002), [1, sumC + M]);
for (const _ of range(0, 20)) source = tf.tidy(() => pgdStep(problem, params, testTokens, source).next);
const accuracyCi = await masked(g => ({ mask: g }));
const accuracyAdversary = await masked(g => {
  const [s, delta] = tf.split(source, [sumC, M], 1) as [T, T];
  return { mask: interpolate(g, s), delta };
});

// The heads' components: important (mean CI above 0.5) where the solution needs them.
const places = range(0, 512).map(i => placeOfM(held.row(i)));
const g3 = tf.tidy(() => importances(problem, params, testTokens).g.reshape([512, LENGTH, sumC]));
const meanAt = async (at: (row: number) => number) => {
  const onePlace = tf.tidy(() =>
    g3
      .mul(tf.oneHot(range(0, 512).map(at), LENGTH).reshape([512, LENGTH, 1]))
      .sum([0, 1])
      .div(512),
  );
  return numbers(onePlace);
};
const atM = await meanAt(i => places[i]!);
const atS = await meanAt(i => places[i]! - 1);
const atEnd = await meanAt(() => LENGTH - 1);
const anywhere = await numbers(tf.tidy(() => g3.mean([0, 1])));
const whereOf: Record<string, Float32Array> = {
  'layers.0.q': atM,
  'layers.0.k': atS,
  'layers.0.v': atS,
  'layers.0.o': atM,
  'layers.1.q': atEnd,
  'layers.1.k': atM,
  'layers.1.v': atM,
  'layers.1.o': atEnd,
};
const heads = problem.modules.flatMap(m =>
  range(m.offset, m.offset + m.C)
    .filter(c => whereOf[m.path]![c]! > 0.5)
    .map(c => ({ c, name: `${m.path}:${c - m.offset}`, layer: Number(m.path[7]) })),
);
const alive = range(0, sumC).filter(c => anywhere[c]! > 1e-6);
const others = alive.filter(c => !heads.some(h => h.c === c));
const without = (deleted: number[]): Masks => ({
  mask: tf.tensor2d(
    Float32Array.from({ length: sumC }, (_, c) => Number(!deleted.includes(c))),
    [1, sumC],
  ),
});
const ofLayer = (l: number) => heads.filter(h => h.layer === l).map(h => h.c);
const accuracyWithoutPrevious = await masked(() => without(ofLayer(0)));
const accuracyWithoutInduction = await masked(() => without(ofLayer(1)));
const accuracyWithoutOthers = await masked(() => without(others.slice(0, Math.max(heads.length, 1))));
console.log(`the heads: ${heads.map(h => h.name).join(' ')}`);
console.log(`alive ${alive.length}`);

/** Attention as text: of the token M in layer 0 and of the last S in layer 1, in tenths. */
function picture(title: string, linear: Linear, i: number) {
  const tokens = inputBatch(held, [i]);
  const line = (l: number, at: number) => {
    const pattern = tf.tidy(() =>
      tf.slice(network(tokens, linear).attention[l]!, [0, at, 0], [1, 1, LENGTH]).dataSync(),
    );
    return Array.from(pattern, p => (p < 0.05 ? '·' : Math.min(9, Math.round(10 * p)))).join('');
  };
  console.log(`${title}\n  M looks at   ${line(0, places[i]!)}\n  end looks at ${line(1, LENGTH - 1)}`);
}
const marks = Array.from({ length: LENGTH }, (_, s) =>
  s === places[0]! - 1 || s === LENGTH - 1 ? 'S' : s === places[0] ? 'M' : ' ',
).join('');
console.log(`               ${marks}`);
picture('the target', ownLinear(target), 0);
picture('without the previous-token components', maskedLinear(problem, params, without(ofLayer(0))), 0);
picture('without the induction components', maskedLinear(problem, params, without(ofLayer(1))), 0);
const cpu = process.cpuUsage();
void sum;
void toHeads;
console.log(
  JSON.stringify({
    seed,
    targetAccuracy,
    accuracyCi,
    accuracyAdversary,
    accuracyWithoutPrevious,
    accuracyWithoutInduction,
    accuracyWithoutOthers,
    deleted: heads.length,
    alive: alive.length,
    l0: Object.fromEntries(problem.modules.map(m => [m.path, metrics[`eval/l0/0.0_${m.path}`]])),
    reconstruction: metrics['eval/ce_kl/kl_ci_masked'],
    adversarial: metrics['eval/loss/PGDReconLoss'],
    seconds: (performance.now() - started) / 1000,
    cpu: (cpu.user + cpu.system) / 1e6,
    TRY,
  }),
);
