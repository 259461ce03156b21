import * as tf from '@tensorflow/tfjs';
import * as nano from '../nano-param-decomp.ts';
const d = 6;
async function three(seed: number, over: object) {
  const draws = nano.uniformArray(6 * d, seed, 0, 99).map(x => 2 * x - 1);
  const at = (k: number) => Array.from(draws.subarray(k * d, (k + 1) * d));
  const V: number[][] = [];
  for (const k of [0, 1, 2]) {
    let v = at(k);
    for (const w of V) { const p = nano.sum(v.map((x, i) => x * w[i]!)); v = v.map((x, i) => x - p * w[i]!); }
    const n = Math.hypot(...v); V.push(v.map(x => x / n));
  }
  const U = [3, 4, 5].map(at).map(u => u.map(x => x / Math.hypot(...u)));
  const outer = V.map((v, i) => v.flatMap(a => U[i]!.map(b => a * b)));
  const W = outer[0]!.map((_, k) => nano.sum(outer.map(o => o[k]!)));
  const weights = new Map([['layer', nano.makeVariable(Float32Array.from(W), [d, d])]]);
  const target: nano.Target = { linears: [{ path: 'layer', dIn: d, dOut: d }], weights, forward: (x, linear) => linear('layer', x.reshape([-1, d])), compare: nano.mse };
  const row = (i: number) => { const [w, size] = nano.uniformArray(2, seed, i, 98); return Float32Array.from(V[Math.floor(3 * w!)]!, v => v * (0.5 + size!)); };
  const run = await nano.newRun(target, { train: { count: Infinity, seqLen: 1, row }, heldOut: { count: 256, seqLen: 1, row } }, {
    engine: 'wasm', seed, nSteps: 400, batchSize: 32, components: '*=6', evalBatchSize: 256, ciDModel: 16, ciNBlocks: 1, ciNHeads: 2, ciMlpHidden: 32, mainLr: 1e-2,
    gradClipComponents: 1, coeffFaith: 10, coeffImp: 3e-3, coeffStoch: 1, coeffPpgd: 1, ppgdLr: 0.05, evalFreq: 0, slowEvalFreq: 0, faithfulnessWarmupLr: 1e-2, ...over } as never);
  const t = performance.now();
  const m = (await nano.decompose(run))!;
  const g = tf.tidy(() => nano.importances(run.problem, run.params, nano.inputBatch(run.data.heldOut, nano.range(0, 256))).g.max(0)).dataSync();
  const [module] = run.problem.modules;
  const [v, u] = [nano.V(run.params, module!).arraySync() as number[][], nano.U(run.params, module!).arraySync() as number[][]];
  const best = [...g.keys()].filter(c => g[c]! > 0.1).map(c => {
    const o = v.flatMap(r => u[c]!.map(b => r[c]! * b)); const n = Math.hypot(...o);
    return Math.max(...outer.map(w => nano.sum(o.map((x, k) => x * w[k]!)) / n));
  });
  console.log(seed, JSON.stringify(over), 'L0', m['eval/l0/0.0_total'], 'mse ci', m['eval/recon/mse_ci_masked'], 'pgd', m['eval/loss/PGDReconLoss'], 'faith', m['eval/loss/FaithfulnessLoss'], 'cos', best.map(b => b.toFixed(3)).join(), ((performance.now() - t) / 1e3).toFixed(1));
}
for (const over of [{coeffImp: 1e-2, nSteps: 800}, {coeffImp: 1e-2, nSteps: 800, coeffStoch: 3, coeffPpgd: 3}, {coeffImp: 1e-2, nSteps: 600, impBeta: 2}]) for (const seed of [0, 1, 2]) await three(seed, over);
