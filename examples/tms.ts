/**
 * The toy model of superposition: more features than dimensions. x̂ = relu(Wᵀ W x + b) with W [hidden, features] is trained
 * to give back its sparse input. As layers to decompose it has W (`down`) and Wᵀ (`up`); "-id" puts a fixed identity
 * between them.
 *
 * What must be found: in `down` one component for each feature j, which reads x_j alone and writes W's column j; in `up`
 * the same backwards; in the identity no more than `hidden` components. How it is marked: by MMCS and ML2R of `down`
 * (metrics.ts; 1 is perfect), and by the identity-CI error of `down` and `up`: for an input with one feature, one
 * component of each is important, another one for each feature (0 is perfect).
 *
 *   npx tsx examples/tms.ts --size 5-2|40-10|5-2-id|40-10-id [--seed N] [--steps N] [--out DIR]
 */
import * as tf from '@tensorflow/tfjs';
import { type Config, makeVariable, matmul, mse, numbers, sum, type T, type Target } from '../nano-param-decomp.ts';
import { ciPerModule } from './ci-mlp.ts';
import { decomposeTarget, normal, optionsOf, printMarks, sparseFeatures, trainTarget } from './lesson.ts';
import { ciOnOneHot, factors, identityCiError, matchFeatures, rowsOf } from './metrics.ts';

const started = performance.now();
const options = optionsOf('tms', 'size', { '5-2': 1500, '40-10': 3000, '5-2-id': 1500, '40-10-id': 3000 });
const { which, seed } = options;
const [n, hidden] = which.split('-').map(Number) as [number, number];
const withIdentity = which.endsWith('-id');
const small = n === 5;

// 1. The target: W and b, trained on (x − x̂)². A feature is there with probability 0.05, then uniform in [0, 1).
const w = makeVariable(normal(n * hidden, 1 / Math.sqrt(n), seed, 1), [n, hidden]); // Wᵀ
const b = makeVariable(new Float32Array(n), [n]);
const features = (first: number) => sparseFeatures(n, 0.05, 0, seed + 1, first);
const loss = (inputs: T) => {
  const x = inputs.reshape([-1, n]);
  const answer = matmul(matmul(x, w), w, true).add(b).relu();
  return tf.squaredDifference(x, answer).mean();
};
const trained = new Map([
  ['w', w],
  ['b', b],
]);
await trainTarget(trained, loss, [{ rows: features(0), batch: 1024, steps: small ? 5000 : 3000, lr: 5e-3 }], options);

// 2. The same as a network of linear layers.
const copy = async (x: tf.Tensor) => makeVariable(Float32Array.from(await numbers(x)), x.shape);
const weights = new Map([
  ['down', await copy(w)],
  ['identity', await copy(tf.eye(hidden))],
  ['up', await copy(w.transpose())],
  ['up.bias', await copy(b)],
]);
const path = withIdentity ? ['down', 'identity', 'up'] : ['down', 'up'];
const target: Target = {
  linears: path.map(p => ({ path: p, dIn: weights.get(p)!.shape[0]!, dOut: weights.get(p)!.shape[1]! })),
  weights,
  forward: (inputs, linear) => path.reduce((x, p) => linear(p, x), inputs.reshape([-1, n])).relu(),
  compare: mse,
};

// 3. The decomposition. A component that serves two features is a local minimum: the component which would take one of
//    them over is dead, and what reconstructs nothing has no gradient. So it must not come to that early on. Many
//    components give each feature one that lies well already; with p at 3 or 4 a small importance is almost free, so all
//    stay in the race while V and U turn, and only as p falls must one of them win. With a third module, whose chain
//    breaks when any link is off, importance costs half. In the plane (5-2) there are few directions, and starts that
//    end well: several, of which the best is kept.
const SETTINGS = {
  '5-2': { C: 20, price: 1.5e-3, p: [1, 0.7], moves: 2, starts: 3 },
  '5-2-id': { C: 20, price: 7e-4, p: [3, 0.7], moves: 0, starts: 12 },
  '40-10': { C: 200, price: 1e-4, p: [3, 0.9], moves: 0, starts: 2 },
  '40-10-id': { C: 200, price: 5e-5, p: [4, 0.9], moves: 0, starts: 1 },
};
const { C, price, p, moves, starts } = SETTINGS[which as keyof typeof SETTINGS];
const changes: Partial<Config> = {
  ...{ components: `*=${C}`, ciMlpHidden: small ? 64 : 128, batchSize: 256, mainLr: 1e-2, gradClipComponents: 0 },
  ...{ coeffFaith: 1, coeffImp: price, impBeta: 0.5, pStart: p[0]!, pEnd: p[1]!, ppgdInnerSteps: moves },
};
const data = { train: features(2 ** 29), heldOut: features(2 ** 30) };
const { run, metrics } = await decomposeTarget(target, data, options, changes, ciPerModule, starts);

// 4. The marks.
const [down] = run.problem.modules.filter(m => m.path === 'down');
const { v, u } = await factors(run, down!);
const columns = rowsOf(await numbers(w), hidden);
const { mmcs, ml2r } = matchFeatures(columns, v, u, 0.01);
const all = matchFeatures(columns, v, u); // dead components too, as the paper counts
const ci = [...(await ciOnOneHot(run, n))].filter(([m]) => m.path !== 'identity');
const found: Record<string, number> = {};
for (const { path } of run.problem.modules) found[`l0 ${path}`] = metrics[`eval/l0/0.0_${path}`]!;
printMarks({
  ...{
    size: which,
    seed,
    mmcs,
    ml2r,
    mmcsAll: all.mmcs,
    ml2rAll: all.ml2r,
    identityCiError: sum(ci.map(([, g]) => identityCiError(g))),
  },
  ...{ l0: metrics['eval/l0/0.0_total']!, ...found, reconstruction: metrics['eval/recon/mse_ci_masked']! },
  ...{ adversarial: metrics['eval/loss/PGDReconLoss']!, nothingOn: metrics['eval/recon/mse_zero_masked']! },
  seconds: (performance.now() - started) / 1000,
});
