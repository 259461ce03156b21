/**
 * A residual MLP that computes more functions than it has neurons: y = x + relu(x) for 100 sparse features. They enter a
 * residual stream of 1000 through fixed random directions W_E, each layer adds W_out relu(W_in r), and W_Eᵀ reads out.
 * All layers together have 50 neurons (51 for 102 features with three layers): each function is spread over many.
 *
 * What must be found: in each W_in one component for each feature, and in each W_out, which all features share, as many
 * components as it has neurons, its rank. How it is marked: by the identity-CI error of each W_in (for an input with one
 * feature, one component is important, another one for each feature) and the dense error of each W_out (metrics.ts).
 *
 *   npx tsx examples/residual-mlp.ts --layers 1|2|3 [--seed N] [--steps N] [--out DIR]
 */
import * as tf from '@tensorflow/tfjs';
import { type Config, makeVariable, matmul, mse, ownLinear, range, type T, type Target } from '../nano-param-decomp.ts';
import { ciLinear } from './ci-mlp.ts';
import { decomposeTarget, normal, optionsOf, printMarks, sparseFeatures, trainTarget } from './lesson.ts';
import { ciOnOneHot, denseCiError, identityCiError } from './metrics.ts';

const started = performance.now();
const options = optionsOf('residual-mlp', 'layers', { 1: 5000, 2: 2500, 3: 1500 });
const { which, seed } = options;
const L = Number(which);
const n = L === 3 ? 102 : 100; // features
const neurons = L === 3 ? 17 : 50 / L; // of a layer
const WIDTH = 1000;

// 1. The target, trained on its mean squared error. W_E has random rows of length 1 and stays as it is.
const draws = normal(n * WIDTH, 1, seed, 1);
const lengths = range(0, n).map(f => Math.hypot(...draws.subarray(f * WIDTH, (f + 1) * WIDTH)));
const unit = draws.map((x, i) => x / lengths[Math.floor(i / WIDTH)]!);
const embed = makeVariable(unit, [n, WIDTH]);
const linears = range(0, L).flatMap(l => [
  { path: `layers.${l}.in`, dIn: WIDTH, dOut: neurons },
  { path: `layers.${l}.out`, dIn: neurons, dOut: WIDTH },
]);
const initial = (dIn: number, dOut: number, purpose: number) =>
  makeVariable(normal(dIn * dOut, 1 / Math.sqrt(dIn), seed, purpose), [dIn, dOut]);
const target: Target = {
  linears,
  weights: new Map(linears.map(({ path, dIn, dOut }, i) => [path, initial(dIn, dOut, 2 + i)])),
  forward(inputs, linear) {
    let r: T<'N 1000'> = matmul(inputs.reshape([-1, n]), embed);
    for (const l of range(0, L)) r = r.add(linear(`layers.${l}.out`, linear(`layers.${l}.in`, r).relu()));
    return matmul(r, embed, true);
  },
  compare: mse,
};
const loss = (inputs: T) => {
  const x = inputs.reshape([-1, n]);
  return tf.squaredDifference(target.forward(inputs, ownLinear(target)), x.add(x.relu())).mean();
};
/** A feature is there with probability 0.01, then uniform in [−1, 1). */
const features = (first: number) => sparseFeatures(n, 0.01, -1, seed + 1, first);
await trainTarget(
  target.weights,
  loss,
  [{ rows: features(0), batch: 256, steps: L === 1 ? 1000 : 4000, lr: 3e-3 }],
  options,
);

// 2. The decomposition. A feature's function is worth 1.3e-5 of the error: it is there in one row of a hundred, and the
//    error is a mean over a hundred outputs. A component of W_in costs a thirtieth of that, and so does each of the few
//    that W_out keeps on for it. leakyAlpha is the slope outside of [0, 1]: with 0.5 a dead component comes back soon.
//    With the usual 0.01 some features never get one of their own, and are made of ten others. With more layers each does
//    a part of every function, some a small one, which has to be worth its price too.
const changes: Partial<Config> = {
  ...{
    components: `*.in=200,*.out=${neurons}`,
    batchSize: 128,
    mainLr: 4e-3,
    gradClipComponents: 0,
    evalBatchSize: 256,
  },
  ...{ coeffFaith: 5, coeffImp: 6e-5 / L ** 2, pStart: 2, pEnd: 0.5, impBeta: 0.3, leakyAlpha: 0.5, ppgdInnerSteps: 0 },
};
const data = { train: features(2 ** 29), heldOut: features(2 ** 30) };
const { run, metrics } = await decomposeTarget(target, data, options, changes, ciLinear);

// 3. The marks.
const ci = await ciOnOneHot(run, n);
const [found, sums]: Record<string, number>[] = [{}, { in: 0, out: 0 }];
for (const [{ path }, g] of ci) {
  const error = path.endsWith('in') ? identityCiError(g) : denseCiError(g, neurons);
  found![`error ${path}`] = error;
  found![`l0 ${path}`] = metrics[`eval/l0/0.0_${path}`]!;
  sums![path.endsWith('in') ? 'in' : 'out']! += error;
}
printMarks({
  ...{
    layers: L,
    seed,
    identityCiError: sums!.in!,
    denseError: sums!.out!,
    l0: metrics['eval/l0/0.0_total']!,
    ...found,
  },
  ...{ reconstruction: metrics['eval/recon/mse_ci_masked']!, adversarial: metrics['eval/loss/PGDReconLoss']! },
  ...{ nothingOn: metrics['eval/recon/mse_zero_masked']!, seconds: (performance.now() - started) / 1000 },
});
