/**
 * Decomposes a network of your own: write its layers, its forward, and a source of inputs. This one computes
 * y_k = relu(x_k) three times: x_k drives neurons 2k and 2k+1, which answer k reads. So its layer `in` should fall into
 * three rank-one mechanisms, its layer `out` into three that read them, and none is needed where x_k is negative.
 *
 *   npx tsx examples/own-network.ts [run folder]      the folder gets a checkpoint, the metrics and the page
 */
// biome-ignore format: kept on few lines
import {
  compileEvaluation, decompose, firstRows, makeVariable, mse, newRun, type Rows, type Target, uniformArray,
} from '../nano-param-decomp.ts';
import { finish } from '../postprocess/index.ts';
import { factors } from './metrics.ts';

// 1. The network: its linear layers, their weights Wᵀ [dIn,dOut], and the forward, which leaves them to `linear`.
const weight = (...rows: number[][]) => makeVariable(Float32Array.from(rows.flat()), [rows.length, rows[0]!.length]);
const target: Target = {
  linears: [
    { path: 'in', dIn: 3, dOut: 6 },
    { path: 'out', dIn: 6, dOut: 3 },
  ],
  weights: new Map([
    ['in', weight([0.8, 0.6, 0, 0, 0, 0], [0, 0, 0.8, 0.6, 0, 0], [0, 0, 0, 0, 0.8, 0.6])],
    ['in.bias', makeVariable(Float32Array.of(-0.16, -0.12, -0.16, -0.12, -0.16, -0.12), [6])],
    ['out', weight([0.8, 0, 0], [0.6, 0, 0], [0, 0.8, 0], [0, 0.6, 0], [0, 0, 0.8], [0, 0, 0.6])],
  ]),
  forward: (inputs, linear) => linear('out', linear('in', inputs.reshape([-1, 3])).relu()),
  compare: mse,
};

// 2. The inputs: rows without an end; each feature is there with probability 0.2, then uniform in [0, 1].
const features = (seed: number): Rows => ({
  count: Number.POSITIVE_INFINITY,
  seqLen: 1,
  row(i) {
    const draws = uniformArray(6, seed, i, 0);
    return Float32Array.from({ length: 3 }, (_, k) => (draws[k]! < 0.2 ? 2 * draws[k + 3]! - 1 : 0));
  },
});

// 3. The run: what is not given has the method's default. `data`, `params`, `problem` and `engine` are its parts.
// biome-ignore format: kept on few lines
const run = await newRun(target, { train: features(1), heldOut: features(2) }, {
  out: process.argv[2] ?? '', components: '*=8', nSteps: 2000, batchSize: 256, evalFreq: 0, saveEvery: 0,
  mainLr: 5e-3, gradClipComponents: 0, coeffFaith: 1, coeffImp: 1.5e-3, pStart: 1, pEnd: 1,
  ciDModel: 32, ciNBlocks: 1, ciMlpHidden: 64,
});
const metrics = await decompose(run);
await finish(run, metrics!);

// 4. What it found: the components that are ever important, as the directions that they read and write.
const { meanCi } = await compileEvaluation(run.engine, run.problem, run.params)(firstRows(features(2), 1000), 0, false);
const direction = (x: number[]) => x.map(w => (w / Math.hypot(...x)).toFixed(2).padStart(5)).join(' ');
for (const m of run.problem.modules) {
  const { v, u } = await factors(run, m);
  for (const [c, writes] of u.entries()) {
    const reads = v.map(row => row[c]!);
    if (meanCi[m.offset + c]! > 0.01) console.log(`${m.path}:${c}  (${direction(reads)}) -> (${direction(writes)})`);
  }
}
