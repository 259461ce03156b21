/**
 * The toy model of superposition: more features than dimensions. x̂ = relu(Wᵀ W x + b) with W [hidden, features], trained
 * to give back its sparse input. Its two layers are W (`down`) and Wᵀ (`up`); "-id" puts a fixed identity between them.
 *
 * What must be found: in `down` one component for each feature j, which reads x_j and writes W's column j, in `up` the
 * same backwards, and in the identity `hidden` components. How it is marked: MMCS and ML2R (metrics.ts) of `down`, and
 * the identity-CI error of `down` and `up`: for an input with one feature, one component of each layer is important.
 *
 *   npx tsx examples/tms.ts --size 5-2|40-10|5-2-id|40-10-id [--seed N] [--steps N] [--out DIR --page]
 */
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { type Config, decompose, makeVariable, mse, newRun, type Target } from '../nano-param-decomp.ts';
import { finish } from '../postprocess/index.ts';
import { ciPerComponent, ciPerModule } from './ci-mlp.ts';
import { normal, optionsOf, sparseFeatures, trainTarget } from './lesson.ts';
import { ciOnOneHot, factors, identityCiError, matchFeatures, rowsOf } from './metrics.ts';

const TRY = JSON.parse(process.env.TRY ?? '{}');
const SIZES = ['5-2', '40-10', '5-2-id', '40-10-id'] as const;
const options = optionsOf(process.argv.slice(2), 'size', SIZES, 0 || 10000);
const { size, seed } = options;
const [n, hidden] = size.split('-').map(Number) as [number, number];
const withIdentity = size.endsWith('id');
const started = performance.now();

// The target, trained on W and b; as layers it has W twice.
const w = makeVariable(normal(n * hidden, 1 / Math.sqrt(n), seed, 1), [n, hidden]); // Wᵀ
const b = makeVariable(new Float32Array(n), [n]);
const data = sparseFeatures(n, 0.05, 0, seed + 1);
const loss = (inputs: tf.Tensor) => {
  const x = inputs.reshape([-1, n]) as tf.Tensor2D;
  const out = tf
    .matMul(tf.matMul(x, w as tf.Tensor2D), w as tf.Tensor2D, false, true)
    .add(b)
    .relu();
  return out.sub(x).square().mean();
};
const training = [{ rows: data, batch: 1024, steps: n < 40 ? 5000 : 3000, lr: 5e-3, finalFrac: 0.02 }];
const file = process.env.CACHE
  ? path.join(process.env.CACHE, `tms-${n}-${hidden}-${seed}.json`)
  : options.out && path.join(options.out, 'target.json');
await trainTarget(
  new Map([
    ['w', w],
    ['b', b],
  ]),
  loss,
  training,
  { threads: options.threads, file },
);
const wDown = [...(await w.data())]; // [n][hidden]
const wUp = [...(await tf.transpose(w).data())];
const variable = (values: number[], shape: number[]) => makeVariable(Float32Array.from(values), shape);
const identity = Array.from({ length: hidden ** 2 }, (_, i) => Number(i % (hidden + 1) === 0));
const layers = [
  { path: 'down', dIn: n, dOut: hidden },
  ...(withIdentity ? [{ path: 'identity', dIn: hidden, dOut: hidden }] : []),
  { path: 'up', dIn: hidden, dOut: n },
];
const target: Target = {
  linears: layers,
  weights: new Map([
    ['down', variable(wDown, [n, hidden])],
    ['identity', variable(identity, [hidden, hidden])],
    ['up', variable(wUp, [hidden, n])],
    ['up.bias', variable([...(await b.data())], [n])],
  ]),
  forward(inputs, linear) {
    let h = linear('down', inputs.reshape([-1, n]));
    if (withIdentity) h = linear('identity', h);
    return linear('up', h).relu();
  },
  compare: mse,
};

const config: Partial<Config> = {
  out: options.out,
  seed,
  threads: options.threads,
  nSteps: options.steps,
  batchSize: n < 40 ? 256 : 1024,
  components: n < 40 ? '*=20' : '*=100',
  mainLr: 2e-3,
  mainLrFinalFrac: 0.1,
  gradClipComponents: 0,
  gradClipCi: 0,
  coeffFaith: 1,
  coeffImp: 1.5e-3,
  pStart: 1,
  pEnd: 1,
  impBeta: 0.5,
  ciMlpHidden: 64,
  ciDModel: 64,
  ciNBlocks: 1,
  evalFreq: 0,
  saveEvery: 0,
  logEvery: 1000,
  xla: 'off',
  coeffStoch: 0.5,
  coeffPpgd: 0.5,
  ...TRY.config,
};
const ci = { module: ciPerModule, component: ciPerComponent, shared: undefined }[(TRY.ci ?? 'module') as 'module'];
const run = await newRun(target, { train: data, heldOut: sparseFeatures(n, 0.05, 0, seed + 1, 2 ** 30) }, config, ci);
const metrics = (await decompose(run))!;
await finish(run, metrics);

const down = run.problem.modules.find(m => m.path === 'down')!;
const { v, u } = await factors(run, down);
const { mmcs, ml2r } = matchFeatures(rowsOf(wDown, hidden), v, u);
const ciMatrix = await ciOnOneHot(run, n);
const errors = Object.fromEntries(
  [...ciMatrix].filter(([m]) => m.path !== 'identity').map(([m, g]) => [m.path, identityCiError(g)]),
);
const l0 = Object.fromEntries(run.problem.modules.map(m => [m.path, metrics[`eval/l0/0.0_${m.path}`]]));
if (process.env.SHOW)
  for (const [m, g] of ciMatrix) {
    console.log(m.path);
    for (const r of g) console.log(r.map(x => x.toFixed(2)).join(' '));
  }
const cpu = process.cpuUsage();
console.log(
  JSON.stringify({
    size,
    seed,
    mmcs,
    ml2r,
    identityCiError: errors,
    l0,
    reconstruction: metrics['eval/recon/mse_ci_masked'],
    unmasked: metrics['eval/recon/mse_unmasked'],
    adversarial: metrics['eval/loss/PGDReconLoss'],
    faith: metrics['eval/loss/FaithfulnessLoss'],
    zero: metrics['eval/recon/mse_zero_masked'],
    seconds: (performance.now() - started) / 1000,
    cpu: (cpu.user + cpu.system) / 1e6,
    TRY,
  }),
);
