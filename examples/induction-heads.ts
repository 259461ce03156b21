/**
 * Induction heads: an attention-only network of two layers with one head each, which answers "what came after S before?".
 * A row is 64 tokens, random but for S, one fixed token: it stands once in the first half, before M, and at the end, and
 * M is the answer. It takes two heads: in layer 0 the token M learns that S is before it (previous token); in layer 1 the
 * last S finds that token and copies it (induction).
 *
 * What must be found: few components, where the heads work: layer 0 at M (k and v at the S before it), layer 1 at the end
 * (k and v at M). How it is marked: the accuracy under CI masks and under a fresh adversary's; and the accuracy when
 * exactly those components are deleted, beside that without all the others, with the attention of both heads.
 *
 *   npx tsx examples/induction-heads.ts [--rows 64|32] [--seed N] [--steps N] [--out DIR]
 */
import * as tf from '@tensorflow/tfjs';
// biome-ignore format: kept on few lines
import {
  type Config, importances, inputBatch, kl, type Linear, type Masks, makeVariable, maskedLinear, matmul, ownLinear,
  type Rows, range, type T, type Target, totalC, uniformArray,
} from '../nano-param-decomp.ts';
// biome-ignore format: kept on few lines
import {
  adversaryMasks, allBut, decomposeTarget, inTenths, meanRow, normal, optionsOf, printMarks, trainTarget,
} from './lesson.ts';

const started = performance.now();
const options = optionsOf('induction-heads', 'rows', { 64: 3000, 32: 3000 });
const { seed } = options;
const LENGTH = Number(options.which);
const [D, RANDOM, BEGIN, S, VOCAB] = [16, 128, 128, 129, 130];

// 1. The data: rows without an end, and the answer to each, the token after the first S.
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
function answers(tokens: T<'B S'>): T<'B'> {
  const [before, after] = [0, 1].map(from => tf.slice(tokens, [0, from], [-1, tokens.shape[1]! - 1])) as [T, T];
  return before.equal(S).cast('int32').mul(after).sum(1).cast('int32');
}

// 2. The target. Sinusoidal positions are added to q and k, so they are no part of the residual stream.
const linears = [0, 1].flatMap(l => [...'qkvo'].map(p => ({ path: `${l}.${p}`, dIn: D, dOut: D })));
const matrix = (dIn: number, dOut: number, purpose: number, deviation = 1 / Math.sqrt(dIn)) =>
  makeVariable(normal(dIn * dOut, deviation, seed, purpose), [dIn, dOut]);
const [embed, unembed] = [matrix(VOCAB, D, 1, 1), matrix(D, VOCAB, 2)];
const weights = new Map(linears.map(({ path, dIn, dOut }, i) => [path, matrix(dIn, dOut, 3 + i)]));
const sinusoid = (s: number) => (i: number) => Math.sin(s / 10_000 ** ((i >> 1) / (D / 2)) + (i % 2) * (Math.PI / 2));
/** The logits at the end of each row [B,vocab], and the attention of both layers [B,S,S]. */
function network(tokens: T<'B S'>, linear: Linear) {
  const [B = 0, length = 0] = tokens.shape;
  const positions = tf.tensor2d(range(0, length).map(s => range(0, D).map(sinusoid(s))));
  const causal = tf.tensor2d(range(0, length).map(s => range(0, length).map(to => (to > s ? -1e9 : 0))));
  let x: T<'N d'> = matmul(tf.oneHot(tokens.flatten() as tf.Tensor1D, VOCAB).cast('float32'), embed);
  const attention = [0, 1].map(l => {
    const [q, k, v] = [...'qkv'].map(p => linear(`${l}.${p}`, x).reshape([B, length, D])) as [T, T, T];
    const scores = tf.matMul(q.add(positions), k.add(positions), false, true).mul(1 / Math.sqrt(D));
    const pattern: T<'B S S'> = scores.add(causal).softmax();
    x = x.add(linear(`${l}.o`, tf.matMul(pattern, v).reshape([-1, D])));
    return pattern;
  });
  const end = tf.slice(x.reshape([B, length, D]), [0, length - 1, 0], [B, 1, D]).reshape([B, D]);
  return { logits: matmul(end, unembed), attention };
}
const target: Target = { linears, weights, compare: kl, forward: (tokens, linear) => network(tokens, linear).logits };
const loss = (tokens: T) => {
  const logProbs = target.forward(tokens, ownLinear(target)).logSoftmax();
  return tf.sum(tf.oneHot(answers(tokens) as tf.Tensor1D, VOCAB).mul(logProbs)).div(-tokens.shape[0]!);
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
  ...{ components: '*=16', batchSize: 16, mainLr: 2e-3, gradClipComponents: 0, gradClipCi: 1 },
  ...{ coeffFaith: 1e3, coeffImp: 4e-3, coeffPpgd: 1, pStart: 1, pEnd: 0.5 },
  ...{ ciDModel: 64, ciNBlocks: 1, ciMlpHidden: 128, evalBatchSize: 64, harvestRows: 256 },
};
const heldOut = rows(LENGTH, 2 ** 30);
const { run, metrics } = await decomposeTarget(target, { train: rows(LENGTH, 2 ** 29), heldOut }, options, changes);
const { problem, params } = run;

// 4. The components of the heads: g is above 0.5, on average, at the place where their matrix works.
const B = 256;
const tokens = inputBatch(heldOut, range(0, B)); // other rows than those of training
const sumC = totalC(problem.modules);
const g = tf.tidy(() => importances(problem, params, tokens).g); // [B·S,ΣC]
const firstS = range(0, B).map(b => heldOut.row(b).indexOf(S));
const at = (position: (s: number) => number) => firstS.map((s, b) => b * LENGTH + position(s)); // rows of g
const places = { S: at(s => s), M: at(s => s + 1), end: at(() => LENGTH - 1) };
const worksAt = { '0.q': 'M', '0.k': 'S', '0.v': 'S', '0.o': 'M', '1.q': 'end', '1.k': 'M', '1.v': 'M', '1.o': 'end' };
const [previous, induction]: [number[], number[]] = [[], []];
for (const { path, C, offset } of problem.modules) {
  const place = worksAt[path as '0.q'] as keyof typeof places;
  const mean = await meanRow(g, places[place]);
  const found = range(offset, offset + C).filter(c => mean[c]! > 0.5);
  (path.startsWith('0') ? previous : induction).push(...found);
  console.log(`  ${path}: ${found.length} of ${C} components at ${place}`);
}
const heads = [...previous, ...induction];
const others = range(0, sumC).filter(c => !heads.includes(c)); // the control
const without = (deleted: number[]) => allBut(sumC, new Set(deleted));

// 5. Where the heads look in the first row: in layer 0 from M, in layer 1 from the last S.
const M = places.M[0]!;
console.log(`\n  Where the heads look, in tenths\n                  ${'SM'.padStart(M + 1).padEnd(LENGTH - 1)}S`);
for (const [title, linear] of [
  ['the target', ownLinear(target)],
  ['without the previous-token components', maskedLinear(problem, params, without(previous))],
  ['without the induction components', maskedLinear(problem, params, without(induction))],
] as const) {
  const { attention } = tf.tidy(() => network(tf.slice(tokens, [0, 0], [1, -1]), linear));
  const line = (l: number, from: number) => inTenths(tf.slice(attention[l]!, [0, from, 0], [1, 1, -1]).dataSync());
  console.log(`  ${title}\n    layer 0, M    ${line(0, M)}\n    layer 1, end  ${line(1, LENGTH - 1)}`);
}

// 6. The marks.
const accuracyOf = (linear: Linear) =>
  tf.tidy(() => target.forward(tokens, linear).argMax(1).equal(answers(tokens)).cast('float32').mean().dataSync()[0]!);
const accuracy = (masks: Masks) => accuracyOf(maskedLinear(problem, params, masks));
printMarks({
  ...{ seed, targetAccuracy: accuracyOf(ownLinear(target)) },
  ...{ accuracyCi: accuracy({ mask: g }), accuracyAdversary: accuracy(adversaryMasks(run, tokens)) },
  ...{ componentsOfHeads: heads.length, accuracyWithoutPrevious: accuracy(without(previous)) },
  ...{ accuracyWithoutInduction: accuracy(without(induction)), accuracyWithoutOthers: accuracy(without(others)) },
  ...{ l0: metrics['eval/l0/0.0_total']!, alive: metrics['eval/n_alive']! },
  ...{ reconstruction: metrics['eval/ce_kl/kl_ci_masked']!, adversarial: metrics['eval/loss/PGDReconLoss']! },
  seconds: (performance.now() - started) / 1000,
});
