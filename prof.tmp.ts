import * as tf from '@tensorflow/tfjs';
import * as nano from './nano-param-decomp.ts';
import { loadTensorFlow } from './engine/tensorflow.ts';
import { Graph } from './engine/graph.ts';
const which = process.argv[2] ?? 'toy';
await loadTensorFlow({ threads: 1 });
const graph = new Graph({});
const engine = { name: 'tensorflow', gpu: false, description: '', compile: (n: string, f: never) => graph.compile(n, f) } as unknown as nano.Engine;
const simple = (d: number, heads: number, kv: number, mlp: number, vocab: number, layers: number, type = 'llama_simple_mlp') => ({ model_type: type, hidden_size: d, num_attention_heads: heads, num_key_value_heads: kv, intermediate_size: mlp, vocab_size: vocab, num_hidden_layers: layers, max_position_embeddings: 512, tie_word_embeddings: true });
const S: Record<string, [object, Partial<nano.Config>]> = {
  toy: [simple(48, 4, 4, 192, 88, 1), { ...nano.PRESETS.toy!.config }],
  stories: [simple(64, 8, 4, 172, 512, 5, 'llama'), { components: '*=64', batchSize: 8, seqLen: 64, ciDModel: 128, ciNBlocks: 2, ciNHeads: 4, ciMlpHidden: 512 }],
  ss: [simple(192, 6, 3, 768, 4019, 2), { ...nano.PRESETS['simplestories-2L']!.config, batchSize: 4, seqLen: 128 }],
};
const [tc, diff] = S[which]!;
const config = { ...nano.DEFAULTS, ...diff, nSteps: 1000 } as nano.Config;
const arch = nano.readArchitecture(tc as never, 'x');
const linears = nano.linearLayers(arch);
const weights = new Map<string, tf.Variable>();
const R = (n: string, s: number[], d: number) => weights.set(n, tf.tidy(() => tf.variable(tf.randomNormal(s, 0, d), false)));
R(`${arch.names.embed}.weight`, [arch.vocab, arch.dModel], 0.1);
for (const l of linears) R(l.path, [l.dIn, l.dOut], 1 / Math.sqrt(l.dIn));
for (let i = 0; i < arch.nLayers; i++) for (const p of ['norm1', 'norm2'] as const) weights.set(`${arch.names[p].replace('{i}', String(i))}.weight`, tf.tidy(() => tf.variable(tf.ones([arch.dModel]), false)));
weights.set(`${arch.names.last}.weight`, tf.tidy(() => tf.variable(tf.ones([arch.dModel]), false)));
const target = { arch, linears, weights, dir: '', sha256: '' };
const problem = { target, modules: nano.chooseModules(linears, config.components), config };
const step = nano.compileStep(engine, problem, nano.initialState(problem, nano.initialParams(problem)));
const rows = { count: 64, seqLen: config.seqLen, row: (i: number) => Int32Array.from({ length: config.seqLen }, (_, k) => (i * 31 + k * 7) % arch.vocab) };
for (let n = 0; n < 3; n++) await step(n, rows);
const cpu0 = process.cpuUsage(), t0 = performance.now();
const K = which === 'toy' ? 50 : 10;
for (let n = 3; n < 3 + K; n++) await step(n, rows);
const c = process.cpuUsage(cpu0);
console.log(which, 'cpu ms/step', (c.user + c.system) / 1000 / K, 'wall', (performance.now() - t0) / K);
const f = graph.stats.functions[0]!;
console.log('ops', f.ops, 'nodes', f.nodes, 'bytes', graph.stats.bytes);
const by = Object.entries(f.byOp as unknown as Record<string, { nodes: number; ms: number }>).sort((a, b) => b[1].ms - a[1].ms);
for (const [op, { nodes, ms }] of by.slice(0, 28)) console.log(op.padEnd(28), String(nodes).padStart(5), ms.toFixed(1).padStart(9));
