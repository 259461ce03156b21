import assert from 'node:assert/strict';
import { test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { close, graphCases, network, uniform, values } from './graph.cases.ts';
import { Graph } from './graph.ts';
import { loadTensorFlow } from './tensorflow.ts';

const missing = await loadTensorFlow({ threads: 1 }).then(
  () => false as const,
  (error: Error) => error.message,
);
const options = { skip: missing };
graphCases(given => new Graph(given), options);

test('XLA draws the same random numbers and gives the same losses', options, async () => {
  const [eager, compiled] = [network(), network()];
  const graph = new Graph({ xla: true });
  const step = graph.compile('step', feeds => ({ ...compiled.step(feeds), bits: uniform([1000], feeds.key!) }));
  for (let t = 1; t <= 3; t++) {
    const feeds = eager.feeds(t);
    const { loss } = tf.tidy(() => eager.step(feeds));
    const actual = await step(feeds);
    close(actual.loss!, loss!, 1e-4);
    assert.deepEqual(values(actual.bits!), values(uniform([1000], feeds.key!)));
  }
  graph.dispose();
});

test('variables can be read, cloned and assigned outside at any time', options, async () => {
  const w = tf.variable(tf.tensor1d([0.1, -0, 1e-40, 1e38]), false);
  const graph = new Graph();
  const double = graph.compile('double', () => {
    w.assign(w.mul(2));
    return {};
  });
  await double({});
  const old = w.clone(); // not looked at before it is out of date
  await double({});
  const bits = new Uint32Array(w.dataSync().slice().buffer);
  graph.pull();
  graph.push();
  assert.deepEqual(new Uint32Array(w.dataSync().slice().buffer), bits);
  w.assign(tf.tensor1d([1, 2, 3, 4]));
  const fresh = w.clone();
  await double({});
  close(w, [2, 4, 6, 8]);
  close(old, [0.2, -0, 2e-40, 2e38]);
  close(fresh, [1, 2, 3, 4]);
  const second = tf.variable(w, false); // shares the stub
  await double({});
  close(second, [2, 4, 6, 8]);
  second.dispose();
  const exact = tf.randomNormal([4]) as tf.Tensor1D;
  w.assign(exact);
  graph.push();
  graph.pull();
  assert.deepEqual(values(w), values(exact));
  graph.dispose();
});

test('memory stays flat', options, async () => {
  const { variables, step, feeds } = network();
  const start = tf.memory().numTensors;
  const binding = (tf.backend() as unknown as { binding: { getNumOfTensors(): number } }).binding;
  const graph = new Graph();
  const compiled = graph.compile('step', step);
  const fed = feeds(1);
  const once = async () => tf.dispose(await compiled(fed));
  for (let i = 0; i < 20; i++) await once();
  const another = feeds(2, 16); // a new shape: recorded anew
  tf.tidy(() => {
    for (const feed of Object.values(another)) feed.add(0); // which uploads it
  });
  const uploaded = binding.getNumOfTensors();
  for (let i = 0; i < 2; i++) tf.dispose(await compiled(another));
  assert.equal(binding.getNumOfTensors(), uploaded, 'what recording and checking took is given back');
  tf.dispose(another);
  const [tensors, handles, rss] = [tf.memory().numTensors, binding.getNumOfTensors(), process.memoryUsage().rss];
  assert.equal(tensors, start + Object.keys(fed).length);
  for (let i = 0; i < 300; i++) {
    await once();
    if (i % 10 === 0) variables[0]!.dataSync();
  }
  variables[0]!.dataSync();
  assert.equal(tf.memory().numTensors, tensors);
  assert.ok(binding.getNumOfTensors() - handles <= variables.length); // those fetched with the one just looked at
  assert.ok(process.memoryUsage().rss - rss < 20 * 2 ** 20);
  graph.dispose();
});
