/** Prompt graphs against PyTorch's autograd, against finite differences, and against sums that must come out. */

import assert from 'node:assert/strict';
import { before, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { importances, V } from '../nano-param-decomp.ts';
import { fixtureGraph, fixtureJob } from './fixture.ts';
import { graphDefaults } from './formats.ts';
import { componentForm, inputOf, leafGradients, type Reader } from './forward.ts';
import { attribute, promptGraph } from './graph.ts';
import { influences, nextTokens, viewerGraph } from './viewer.ts';

before(async () => {
  await tf.setBackend('cpu');
});

for (const name of ['llama', 'simple_mlp'] as const) {
  test(`${name}: nodes and edges are PyTorch's, the strongest hundred to 1e-3 each`, async () => {
    const job = await fixtureJob(name);
    const expected = fixtureGraph(name);
    const graph = await promptGraph(job, expected.tokens, { incoming: 1000, batchPositions: 30 });
    const nameOf = (n: Record<string, unknown>) =>
      [n.position, n.module ?? '', n.index ?? '', n.embedding ?? '', n.output ?? ''].join();
    const ids = new Map(graph.nodes.map(n => [nameOf(n), n.id]));
    assert.equal(ids.size, expected.nodes.length);
    for (const n of expected.nodes) assert.ok(ids.has(nameOf(n)), `no node ${nameOf(n)}`);
    const ours = new Map(graph.edges.map(([a, b, w]) => [`${a}-${b}`, w]));
    const theirs = expected.edges.map(([a, b, w]): [string, number] => {
      const [from, to] = [a, b].map(id => ids.get(nameOf(expected.nodes[id]!)));
      return [`${from}-${to}`, w];
    });
    theirs.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
    const scale = Math.abs(theirs[0]![1]);
    for (const [i, [edge, w]] of theirs.entries()) {
      const error = Math.abs((ours.get(edge) ?? 0) - w);
      assert.ok(error < 1e-3 * (i < 100 ? Math.abs(w) : scale), `${edge}: ${ours.get(edge)}, PyTorch says ${w}`);
    }
    const known = new Set(theirs.map(([edge]) => edge));
    for (const [edge, w] of ours) assert.ok(known.has(edge) || Math.abs(w) < 1e-5 * scale, `${edge} does not exist`);
  });
}

test('an edge is what a small change of the stopped activation does', async () => {
  const { problem, params, rows } = await fixtureJob('llama');
  const form = componentForm(problem, params, tf.tensor2d([rows[0]!], undefined, 'int32'), true);
  const readers = [...problem.modules.keys(), 'output' as const];
  let compared = 0;
  for (const reader of readers) {
    const width = reader === 'output' ? problem.target.arch.dModel : problem.modules[reader]!.dIn;
    const upstream = tf.randomNormal([7, width], 0, 1, 'float32', 1);
    const leaves = { embedded: form.embedded, outputs: form.outputs, B: 1 };
    const gradients = leafGradients(form, reader, leaves, upstream);
    for (const i of problem.modules.keys()) {
      const direction = tf.randomNormal(form.outputs[i]!.shape, 0, 1, 'float32', 2);
      const value = (step: number) => {
        const outputs = form.outputs.map((o, k) => (k === i ? tf.add(o, tf.mul(step, direction)) : o));
        return tf.sum(tf.mul(inputOf(form, reader, form.embedded, outputs, 1), upstream)).dataSync()[0]!;
      };
      const measured = (value(5e-3) - value(-5e-3)) / 1e-2;
      const gradient = gradients.outputs[i];
      const slope = gradient ? tf.sum(tf.mul(gradient, direction)).dataSync()[0]! : 0;
      assert.ok(Math.abs(slope - measured) < 5e-3 + 1e-3 * Math.abs(slope), `${reader} <- ${i}: ${slope}, ${measured}`);
      if (Math.abs(slope) > 0.1) compared++;
    }
  }
  assert.ok(compared > 8, `only ${compared} slopes were not small`);
});

test('where the reader is linear, all that comes in adds up to what it reads', async () => {
  const job = await fixtureJob('simple_mlp');
  // x / √(mean x² + ε) is linear in x where ε is far above mean x²
  const arch = { ...job.problem.target.arch, eps: 1e6 };
  const problem = { ...job.problem, target: { ...job.problem.target, arch } };
  const form = componentForm(problem, job.params, tf.tensor2d([job.rows[1]!], undefined, 'int32'), false);
  const residual = problem.modules.flatMap((m, i): Reader[] => (/[qkv]_proj|c_fc/.test(m.path) ? [i] : []));
  for (const reader of [...residual, 'output' as const]) {
    const columns = reader === 'output' ? tf.eye(arch.dModel) : V(job.params, problem.modules[reader]!);
    const vectors = await tf.transpose(columns).array();
    const read = reader === 'output' ? form.final : form.acts[reader]!;
    const values = (await read.array()) as number[][];
    const wanted = (vectors as number[][]).flatMap((vector, c) =>
      [0, 3, 6].map(position => ({
        reader,
        position,
        vector: Float32Array.from(vector),
        value: values[position]![c]!,
      })),
    );
    const largest = Math.max(...wanted.map(w => Math.abs(w.value)));
    await attribute(form, wanted, 4096, (k, { embedding, same, across }) => {
      assert.ok(across.every(x => x === undefined));
      const total = embedding + same.flatMap(x => [...(x ?? [])]).reduce((sum, x) => sum + x, 0);
      assert.ok(Math.abs(total - wanted[k]!.value) < 1e-4 * largest, `${reader}: ${total}, not ${wanted[k]!.value}`);
    });
  }
});

test('with the delta component, the form is the target', async () => {
  const { problem, params, rows } = await fixtureJob('llama');
  const tokens = tf.tensor2d(rows, undefined, 'int32');
  const logits = tf.matMul(
    componentForm(problem, params, tokens, true).final as tf.Tensor2D,
    problem.target.weights.get('lm_head.weight') as unknown as tf.Tensor2D,
    false,
    true,
  );
  const logProbs = importances(problem, params, tokens).pass.output.logSoftmax();
  const error = tf.max(tf.abs(tf.sub(tf.logSoftmax(logits), logProbs))).dataSync()[0]!;
  assert.ok(error < 1e-5, `${error}`);
});

test('bounds: what is left out is the weakest, and counted', async () => {
  const job = await fixtureJob('simple_mlp');
  const all = await promptGraph(job, job.rows[0]!, { incoming: 1000 });
  const few = await promptGraph(job, job.rows[0]!, { incoming: 3 });
  assert.equal(all.leftOut.edges, 0);
  assert.equal(all.edges.length - few.edges.length, few.leftOut.edges);
  for (const node of few.nodes) {
    const of = (graph: typeof all) => graph.edges.filter(e => e[1] === node.id).map(e => Math.abs(e[2]));
    assert.deepEqual(of(few), of(all).slice(0, 3));
    const sum = (list: number[]) => list.reduce((total, w) => total + w, 0);
    if (of(all).length) assert.ok(Math.abs(node.share! - sum(of(few)) / sum(of(all))) < 1e-6);
  }
  const narrow = await promptGraph(job, job.rows[0]!, { nodesPerPosition: 2 });
  const components = (g: typeof all, t: number) => g.nodes.filter(n => 'module' in n && n.position === t).length;
  for (const t of job.rows[0]!.keys()) assert.equal(components(narrow, t), Math.min(2, components(all, t)));
  assert.equal(all.nodes.length - narrow.nodes.length, narrow.leftOut.nodes);
});

test('the JSON for viewers: ids, layers and links fit, and the influence is what reaches the last position', async () => {
  const job = await fixtureJob('simple_mlp');
  const graph = await promptGraph(job, job.rows[0]!, { incoming: graphDefaults.incoming });
  const { nodes, links, metadata } = viewerGraph(job.problem, graph, 'slug');
  assert.equal(metadata.prompt_tokens.length, 7);
  const ids = new Set(nodes.map(n => n.node_id));
  assert.equal(ids.size, nodes.length);
  for (const n of nodes) assert.ok(n.node_id.startsWith(`${n.layer}_`) && n.node_id.endsWith(`_${n.ctx_idx}`));
  for (const { source, target } of links) assert.ok(ids.has(source) && ids.has(target));
  const outputs = nodes.filter(n => n.feature_type === 'logit');
  assert.ok(outputs.length > 0 && outputs.every(n => n.ctx_idx === 6 && n.layer === '12' && n.clerp.includes('(p=')));
  assert.deepEqual(outputs.map(n => n.is_target_logit).filter(Boolean), [true]);
  const influence = influences(graph, nextTokens(graph, 6));
  const roots = graph.nodes.filter(n => !graph.edges.some(e => e[1] === n.id));
  const [atRoots, start] = [roots, graph.nodes.filter(n => 'output' in n && n.position === 6)].map(list =>
    list.reduce((sum, n) => sum + influence[n.id]!, 0),
  );
  assert.ok(Math.abs(atRoots! - start!) < 1e-9, 'influence is neither lost nor made on the way');
});
