/**
 * Induction heads: an attention-only network of two layers with one head each, which answers "what came after S before?".
 * A row is 64 tokens, random but for S, one fixed token: it stands once in the first half, before M, and at the end, and
 * M is the answer. It takes two heads: in layer 0 the token M learns that S is before it (previous token); in layer 1 the
 * last S finds that token and copies it (induction).
 *
 * What must be found: few components, where the heads work: layer 0 at M (k and v at the S before it), layer 1 at the end
 * (k and v at M). How it is marked: the accuracy under CI masks and under a fresh adversary's; and the accuracy when
 * exactly those components are deleted, beside that without as many others, with the attention of both heads.
 *
 *   npx tsx examples/induction-heads.ts [--rows 64|32] [--seed N] [--steps N] [--out DIR]
 */
import * as tf from '@tensorflow/tfjs';
import {
  type Config,
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
  numbers,
  ownLinear,
  pgdStep,
  type Rows,
  range,
  type T,
  type Target,
  totalC,
  uniformArray,
} from '../nano-param-decomp.ts';
import { decomposeTarget, normal, optionsOf, printMarks, trainTarget } from './lesson.ts';

const started = performance.now();
const options = optionsOf('induction-heads', 'rows', { 64: 2000, 32: 2000 });
const { seed } = options;
const LENGTH = Number(options.which);
const [D, RANDOM, BEGIN, S, VOCAB] = [16, 128, 128, 129, 130];

// 1. The data: a source of rows without an end.
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

// 2. The target. Sinusoidal positions are added to q and k, so they are no part of the residual stream.
const linears = [0, 1].flatMap(l => [...'qkvo'].map(p => ({ path: `layers.${l}.${p}`, dIn: D, dOut: D })));
const matrix = (dIn: number, dOut: number, purpose: number, deviation = 1 / Math.sqrt(dIn)) =>
  makeVariable(normal(dIn * dOut, deviation, seed, purpose), [dIn, dOut]);
const embed = matrix(VOCAB, D, 1, 1);
const unembed = matrix(D, VOCAB, 2);
const weights = new Map(linears.map(({ path, dIn, dOut }, i) => [path, matrix(dIn, dOut, 3 + i)]));
const angle = (s: number, i: number) => s / 10_000 ** ((i >> 1) / (D / 2)) + (i % 2) * (Math.PI / 2);
const sinusoids = (length: number) =>
  tf.tensor2d(range(0, length).map(s => range(0, D).map(i => Math.sin(angle(s, i)))));
/** The logits at the end of each row [B,vocab], and the attention of both layers [B,S,S]. */
function network(tokens: T<'B S'>, linear: Linear) {
  const [B = 0, length = 0] = tokens.shape;
  const position = tf.range(0, length, 1, 'float32');
  const later = position
    .reshape([1, length])
    .greater(position.reshape([length, 1]))
    .cast('float32');
  let x: T<'N d'> = matmul(tf.oneHot(tokens.flatten() as tf.Tensor1D, VOCAB).cast('float32'), embed);
  const attention = [0, 1].map(l => {
    const [q, k, v] = [...'qkv'].map(p => linear(`layers.${l}.${p}`, x).reshape([B, length, D])) as [T, T, T];
    const places = sinusoids(length);
    const scores = tf.matMul(q.add(places), k.add(places), false, true).mul(1 / Math.sqrt(D));
    const pattern: T<'B S S'> = scores.add(later.mul(-1e9)).softmax();
    x = x.add(linear(`layers.${l}.o`, tf.matMul(pattern, v).reshape([B * length, D])));
    return pattern;
  });
  const end = tf.slice(x.reshape([B, length, D]), [0, length - 1, 0], [B, 1, D]).reshape([B, D]);
  return { logits: matmul(end, unembed), attention };
}
const target: Target = { linears, weights, compare: kl, forward: (tokens, linear) => network(tokens, linear).logits };

/** M of each row: the token after the S that is not the last. */
function answers(tokens: T<'B S'>): tf.Tensor1D {
  const [B = 0, length = 0] = tokens.shape;
  const isS = tf
    .slice(tokens, [0, 0], [B, length - 1])
    .equal(S)
    .cast('int32');
  return isS
    .mul(tf.slice(tokens, [0, 1], [B, length - 1]))
    .sum(1)
    .cast('int32') as tf.Tensor1D;
}
const loss = (tokens: T) => {
  const right = tf.oneHot(answers(tokens), VOCAB).mul(network(tokens, ownLinear(target)).logits.logSoftmax());
  return right.sum().div(-tokens.shape[0]!);
};
// On short rows first: the heads form there at a fraction of the cost, and then learn to look further.
const stages = [
  { rows: rows(12, 0), batch: 256, steps: 1200, lr: 5e-3, finalFrac: 0.5 },
  { rows: rows(32, 0), batch: 128, steps: 400, lr: 3e-3, finalFrac: 0.5 },
  { rows: rows(LENGTH, 0), batch: 64, steps: 600, lr: 3e-3 },
];
await trainTarget(new Map([...weights, ['embed', embed], ['unembed', unembed]]), loss, stages, options);

// 3. The decomposition, with the method's own CI function: it sees the row.
const changes: Partial<Config> = {
  ...{ components: '*=32', batchSize: 16, mainLr: 2e-3, gradClipComponents: 0, gradClipCi: 1 },
  ...{ coeffFaith: 1e3, coeffImp: 2e-4, pStart: 1, pEnd: 0.5, ppgdInnerSteps: 1 },
  ...{ ciDModel: 64, ciNBlocks: 1, ciMlpHidden: 128, evalBatchSize: 64, harvestRows: 256 },
};
const held = rows(LENGTH, 2 ** 30);
const { run, metrics } = await decomposeTarget(
  target,
  { train: rows(LENGTH, 2 ** 29), heldOut: held },
  options,
  changes,
);
const { problem, params } = run;

// 4. The marks, on other rows than those of training.
const B = 256;
const tokens = inputBatch(held, range(0, B));
const accuracyOf = (logits: () => T) =>
  tf.tidy(() => logits().argMax(1).equal(answers(tokens)).cast('float32').mean().dataSync()[0]!);
const accuracy = (masks: Masks) => accuracyOf(() => maskedForward(problem, params, tokens, masks));
const targetAccuracy = accuracyOf(() => target.forward(tokens, ownLinear(target)));
const [sumC, M] = [totalC(problem.modules), problem.modules.length];
const g = tf.tidy(() => importances(problem, params, tokens).g);
let source: T = tf.tensor2d(uniformArray(sumC + M, seed, 0, 1002), [1, sumC + M]);
for (const _ of range(0, 20)) source = tf.tidy(() => pgdStep(problem, params, tokens, source).next);
const [s, delta] = tf.split(source, [sumC, M], 1) as [T, T];

// The components of the heads: important (g above 0.5 on average) where the heads work.
const all = await numbers(g); // [B·S,ΣC]
const placeOfS = range(0, B).map(i => held.row(i).indexOf(S));
const meanAt = (c: number, place: (row: number) => number) =>
  range(0, B).reduce((total, i) => total + all[(i * LENGTH + place(i)) * sumC + c]! / B, 0);
const places = { S: (i: number) => placeOfS[i]!, M: (i: number) => placeOfS[i]! + 1, end: () => LENGTH - 1 };
const worksAt = {
  '0.q': 'M',
  '0.k': 'S',
  '0.v': 'S',
  '0.o': 'M',
  '1.q': 'end',
  '1.k': 'M',
  '1.v': 'M',
  '1.o': 'end',
} as const;
const heads = problem.modules.flatMap(({ path, C, offset }) => {
  const place = places[worksAt[path.slice('layers.'.length) as '0.q']];
  const found = range(offset, offset + C).filter(c => meanAt(c, place) > 0.5);
  return found.map(c => ({ c, name: `${path}:${c - offset}`, layer: path.startsWith('layers.0') ? 0 : 1 }));
});
const ofLayer = (layer: number) => heads.filter(h => h.layer === layer).map(h => h.c);
const without = (deleted: number[]): Masks => ({
  mask: tf.tensor2d(
    Float32Array.from({ length: sumC }, (_, c) => Number(!deleted.includes(c))),
    [1, sumC],
  ),
});
// The control: as many others, those that are important most often.
const meanCi = range(0, sumC).map(c => range(0, B * LENGTH).reduce((total, n) => total + all[n * sumC + c]!, 0));
const rest = range(0, sumC).filter(c => !heads.some(h => h.c === c));
const others = rest.sort((a, b) => meanCi[b]! - meanCi[a]!).slice(0, heads.length);

/** The attention of the first held-out row in tenths: M's in layer 0, that of the last S in layer 1. */
function showAttention(title: string, linear: Linear) {
  const { attention } = tf.tidy(() => network(tf.slice(tokens, [0, 0], [1, LENGTH]), linear));
  const line = (layer: number, at: number) =>
    Array.from(tf.slice(attention[layer]!, [0, at, 0], [1, 1, LENGTH]).dataSync(), p =>
      p < 0.05 ? '·' : `${Math.min(9, Math.round(10 * p))}`,
    ).join('');
  console.log(`  ${title}\n    layer 0, M    ${line(0, places.M(0))}\n    layer 1, end  ${line(1, LENGTH - 1)}`);
}
const row = range(0, LENGTH).map(k => (k === places.S(0) || k === LENGTH - 1 ? 'S' : k === places.M(0) ? 'M' : ' '));
console.log(`\n  Where the heads look, in tenths\n                  ${row.join('')}`);
showAttention('the target', ownLinear(target));
showAttention('without the previous-token components', maskedLinear(problem, params, without(ofLayer(0))));
showAttention('without the induction components', maskedLinear(problem, params, without(ofLayer(1))));
console.log(
  `  previous token: ${heads
    .filter(h => h.layer === 0)
    .map(h => h.name)
    .join(' ')}`,
);
console.log(
  `  induction:      ${heads
    .filter(h => h.layer === 1)
    .map(h => h.name)
    .join(' ')}`,
);
printMarks({
  ...{
    seed,
    targetAccuracy,
    accuracyCi: accuracy({ mask: g }),
    accuracyAdversary: accuracy({ mask: interpolate(g, s), delta }),
  },
  ...{ componentsOfHeads: heads.length, accuracyWithoutPrevious: accuracy(without(ofLayer(0))) },
  ...{ accuracyWithoutInduction: accuracy(without(ofLayer(1))), accuracyWithoutOthers: accuracy(without(others)) },
  ...{
    l0: metrics['eval/l0/0.0_total']!,
    alive: metrics['eval/n_alive']!,
    reconstruction: metrics['eval/ce_kl/kl_ci_masked']!,
  },
  ...{ adversarial: metrics['eval/loss/PGDReconLoss']!, seconds: (performance.now() - started) / 1000 },
});
