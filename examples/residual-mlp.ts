/**
 * A residual MLP that computes more functions than it has neurons: y = x + relu(x) for 100 sparse features. They enter a
 * residual stream of 1000 through fixed random directions W_E, each layer adds W_out relu(W_in r), and W_Eᵀ reads out.
 * The layers have 50 neurons in all (51 with three layers, for 102 features): each function is spread over many neurons.
 *
 * What must be found: in each W_in one component per feature (for an input with one feature, one component is
 * important), and in each W_out, which all features share, as many as it has neurons, its rank. How it is marked: the
 * identity-CI error of each W_in, and the dense error of each W_out (metrics.ts).
 *
 *   npx tsx examples/residual-mlp.ts --layers 1|2|3 [--seed N] [--steps N] [--out DIR --page]
 */
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import {
  type Config,
  decompose,
  makeVariable,
  matmul,
  mse,
  newRun,
  ownLinear,
  range,
  type T,
  type Target,
} from '../nano-param-decomp.ts';
import { finish } from '../postprocess/index.ts';
import { ciPerModule } from './ci-mlp.ts';
import { normal, optionsOf, sparseFeatures, trainTarget } from './lesson.ts';
import { ciOnOneHot, denseCiError, identityCiError } from './metrics.ts';

const TRY = JSON.parse(process.env.TRY ?? '{}');
const options = optionsOf(process.argv.slice(2), 'layers', ['1', '2', '3'], 6000);
const { seed, threads, out } = options;
const started = performance.now();
const L = Number(options.size);
const n = L === 3 ? 102 : 100;
const neurons = L === 3 ? 17 : 50 / L;
const WIDTH = 1000;

// The target. W_E has rows of length 1.
const draws = normal(n * WIDTH, 1, seed, 1);
const lengths = range(0, n).map(f => Math.hypot(...draws.subarray(f * WIDTH, (f + 1) * WIDTH)));
const embed = makeVariable(
  draws.map((x, i) => x / lengths[Math.floor(i / WIDTH)]!),
  [n, WIDTH],
);
const linears = range(0, L).flatMap(l => [
  { path: `layers.${l}.in`, dIn: WIDTH, dOut: neurons },
  { path: `layers.${l}.out`, dIn: neurons, dOut: WIDTH },
]);
const weights = new Map(
  linears.map(({ path, dIn, dOut }, i) => [
    path,
    makeVariable(normal(dIn * dOut, 1 / Math.sqrt(dIn), seed, 2 + i), [dIn, dOut]),
  ]),
);
const target: Target = {
  ...{ linears, weights, compare: mse },
  forward(inputs, linear) {
    let r: T<'N 1000'> = matmul(inputs.reshape([-1, n]), embed);
    for (const l of range(0, L)) r = r.add(linear(`layers.${l}.out`, linear(`layers.${l}.in`, r).relu()));
    return matmul(r, embed, true);
  },
};
const loss = (inputs: T) => {
  const x = inputs.reshape([-1, n]);
  return tf.squaredDifference(target.forward(inputs, ownLinear(target)), x.add(x.relu())).mean();
};
const features = (first: number) => sparseFeatures(n, 0.01, -1, seed + 1, first);
const file = process.env.CACHE
  ? path.join(process.env.CACHE, `res-${L}-${seed}.json`)
  : out && path.join(out, 'target.json');
await trainTarget(weights, loss, [{ rows: features(0), batch: 1024, steps: L === 3 ? 3000 : 1000, lr: 3e-3 }], {
  threads,
  file,
});

const config: Partial<Config> = {
  ...{ out, seed, threads, nSteps: options.steps, batchSize: 256, components: '*=100', xla: 'off' },
  ...{ mainLr: 2e-3, gradClipComponents: 0, coeffFaith: 1e3, coeffImp: 5e-6, pStart: 2, pEnd: 1, impBeta: 0.5 },
  ...{ ciMlpHidden: 128, ppgdInnerSteps: 1, evalFreq: 0, saveEvery: 0, evalBatchSize: 512 },
  ...TRY.config,
};
const run = await newRun(target, { train: features(2 ** 29), heldOut: features(2 ** 30) }, config, ciPerModule);
const metrics = (await decompose(run))!;
await finish(run, metrics);

// The marks.
const ci = [...(await ciOnOneHot(run, n))];
const [identity, dense]: Record<string, number>[] = [{}, {}];
for (const [{ path }, g] of ci) {
  if (path.endsWith('in')) identity![path] = identityCiError(g);
  else dense![path] = denseCiError(g, neurons);
}
const l0 = Object.fromEntries(run.problem.modules.map(m => [m.path, metrics[`eval/l0/0.0_${m.path}`]]));
if (process.env.SHOW)
  for (const [m, g] of ci)
    console.log(
      m.path,
      g.slice(0, 12).map(r => r.filter(x => x > 0.1).length),
      'diag max',
      g
        .slice(0, 12)
        .map(r => Math.max(...r).toFixed(2))
        .join(' '),
    );
const cpu = process.cpuUsage();
console.log(
  JSON.stringify({
    layers: L,
    seed,
    identityCiError: identity,
    denseError: dense,
    l0,
    reconstruction: metrics['eval/recon/mse_ci_masked'],
    adversarial: metrics['eval/loss/PGDReconLoss'],
    unmasked: metrics['eval/recon/mse_unmasked'],
    zero: metrics['eval/recon/mse_zero_masked'],
    faith: metrics['eval/loss/FaithfulnessLoss'],
    seconds: (performance.now() - started) / 1000,
    cpu: (cpu.user + cpu.system) / 1e6,
    TRY,
  }),
);
