/**
 * What a harvest costs beyond the forward passes that it needs: both over the same rows, in turn, in one process.
 *
 *   npx tsx tools/bench-harvest.ts --model DIR --data FILE [--ci-bias=-1] [--ci-d-model 128] [--engine wasm]
 *
 * The CI function is untrained; --ci-bias moves its logits, so 0 lets half of all components fire, -1 only a few; its sizes are those of a run unless --ci-d-model is given.
 */
import { parseArgs } from 'node:util';
import * as tf from '@tensorflow/tfjs';
import * as nano from '../nano-param-decomp.ts';
import { harvest as harvestAll, harvestDefaults, harvestPass } from '../postprocess/harvest.ts';

const standard = { model: '', data: '', engine: 'auto', components: '*=64', rows: '0', seq: '512', rounds: '3' };
const names = [...Object.keys(standard), 'ci-bias', 'ci-d-model'];
const { values } = parseArgs({ options: Object.fromEntries(names.map(name => [name, { type: 'string' }])) });
const given = { ...standard, 'ci-bias': '0', 'ci-d-model': '', ...values } as Record<string, string> & typeof standard;
const { model, data, engine: wanted, components } = given;
const ciSize = given['ci-d-model'] ? { ciDModel: Number(given['ci-d-model']), ciNBlocks: 2 } : {}; // else auto
const asked = {
  ...nano.DEFAULTS,
  model,
  data,
  components,
  engine: wanted,
  seqLen: Number(given.seq),
  nSteps: 1000,
  ...ciSize,
};
const engine = await nano.startEngine(asked);
const target = await nano.loadTarget(model);
const config = nano.resolveConfig(asked, target.arch, new Set(['seqLen']), engine.gpu);
const { train } = await nano.loadData(target, config);
const rows = { ...train, count: Math.min(train.count, Number(given.rows) || train.count) };
const modules = nano.chooseModules(target.linears, components);
const problem = { target, modules, config };
const params = nano.initialParams(problem);
const bias = params['ci_fn.proj_out.bias']!;
bias.assign(tf.fill(bias.shape, Number(given['ci-bias'])));

const { batchPositions, batchCells } = harvestDefaults;
const B = Math.max(1, Math.floor(Math.min(batchPositions, batchCells / nano.totalC(modules)) / rows.seqLen));
const plain = engine.compile('plain', ({ tokens }: Record<'tokens', tf.Tensor>) => {
  const { g, pass } = nano.importances(problem, params, tokens);
  return { g: tf.sum(g), p: tf.sum(pass.output.logSoftmax().exp()) };
});
async function forward() {
  for (let first = 0; first + B <= rows.count; first += B) {
    const tokens = nano.inputBatch(
      rows,
      Array.from({ length: B }, (_, i) => first + i),
    );
    const out = await plain({ tokens });
    await out.g.data();
    tf.dispose([tokens, out]);
  }
}
const pass = harvestPass(problem, params);
const options = { pass, engine, modules, vocabSize: target.arch.vocab, rows, tokenText: String, passages: [] };
let firings = 0;
async function harvest() {
  const { components, positions } = await harvestAll(options);
  firings = components.reduce((sum, c) => sum + c.firings, 0) / positions;
}
async function seconds(job: () => Promise<void>) {
  const [start, cpu] = [performance.now(), process.cpuUsage()];
  await job();
  const { user, system } = process.cpuUsage(cpu);
  return [(performance.now() - start) / 1e3, (user + system) / 1e6] as const;
}
const text = (t: readonly number[]) => `${t[0]!.toFixed(2)} s (processor ${t[1]!.toFixed(2)})`;
console.log(`${engine.description}; ${rows.count} rows of ${rows.seqLen}, ${nano.totalC(modules)} components`);
for (let round = 0; round < Number(given.rounds); round++) {
  const [a, b] = [await seconds(forward), await seconds(harvest)];
  const [wall, cpu] = [b[0] / a[0], b[1] / a[1]].map(ratio => ratio.toFixed(2));
  console.log(`forward ${text(a)}  harvest ${text(b)}  ratio ${wall} (${cpu})  L0 ${firings.toFixed(0)}`);
}
console.log(
  `peak memory ${(process.resourceUsage().maxRSS / 2 ** 20).toFixed(2)} GiB, ${tf.memory().numTensors} tensors`,
);
