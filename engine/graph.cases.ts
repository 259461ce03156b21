/** What every engine of compiled functions must do: graph.test.ts runs it on TensorFlow, onnxruntime.test.ts on ONNX Runtime. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import type { CompileOptions, compiler } from './compile.ts';
import type { Tensors as Feeds } from './record.ts';

/** A Graph, or ONNX Runtime's compiler. */
export type Engine = Pick<ReturnType<typeof compiler>, 'compile' | 'functions'> & { dispose(): unknown };

/** Uniform noise, as the method makes it: the same key, the same numbers. */
export function uniform(shape: number[], key: tf.Tensor): tf.Tensor {
  const generate = (n: number, seed: number, step: number, purpose: number) =>
    Float32Array.from({ length: n }, (_, i) => Math.abs(Math.sin((i + 1) * (seed + 3 * step + purpose))));
  return tf.engine().runKernel('Uniform', { key }, { shape, purpose: 5, generate: generate as never }) as tf.Tensor;
}

export const values = (tensor: tf.Tensor) => [...tensor.dataSync()];
export function close(actual: tf.Tensor | number[], expected: tf.Tensor | number[], tolerance = 1e-5): void {
  const [a, b] = [actual, expected].map(x => (x instanceof tf.Tensor ? values(x) : x)) as [number[], number[]];
  assert.equal(a.length, b.length);
  a.forEach((x, i) => {
    assert.ok(Math.abs(x - b[i]!) <= tolerance * (1 + Math.abs(b[i]!)), `${i}: ${x}, not ${b[i]}`);
  });
}

/** A two-layer network with dropout and Adam, as plain TFJS: what a training step looks like. */
export function network() {
  const normal = (shape: number[], seed: number) => tf.randomNormal(shape, 0, 0.5, 'float32', seed);
  const parameters = [normal([8, 16], 1), normal([16, 4], 2)].map(value => tf.variable(value, false));
  const zeros = () => parameters.map(({ shape }) => tf.variable(tf.zeros(shape), false));
  const [m, v] = [zeros(), zeros()];
  const variables = [...parameters, ...m, ...v];
  const step = ({ x, y, lr, key, correction1, correction2 }: Feeds) => {
    const loss = (w1: tf.Tensor, w2: tf.Tensor) => {
      const keep = uniform([x!.shape[0]!, 16], key!).greater(0.2).toFloat();
      const hidden = tf.tanh(tf.matMul(x!, w1));
      return tf.matMul(hidden.mul(keep), w2).sub(y!).square().mean() as tf.Scalar;
    };
    const { value, grads } = tf.valueAndGrads(loss as (...args: tf.Tensor[]) => tf.Scalar)(parameters);
    grads.forEach((grad, i) => {
      m[i]!.assign(m[i]!.mul(0.9).add(grad.mul(0.1)));
      v[i]!.assign(v[i]!.mul(0.99).add(grad.square().mul(0.01)));
      const update = m[i]!.div(correction1!).div(v[i]!.div(correction2!).sqrt().add(1e-8));
      parameters[i]!.assign(parameters[i]!.sub(update.mul(lr!)));
    });
    return { loss: value, norm: grads[0]!.norm() };
  };
  const feeds = (t: number, rows = 32): Feeds => ({
    x: tf.randomNormal([rows, 8], 0, 1, 'float32', t),
    y: tf.randomNormal([rows, 4], 0, 1, 'float32', -t),
    lr: tf.scalar(0.1 / t),
    key: tf.tensor1d([7, t], 'int32'),
    correction1: tf.scalar(1 - 0.9 ** t),
    correction2: tf.scalar(1 - 0.99 ** t),
  });
  return { variables, step, feeds };
}

export function graphCases(
  make: (options?: Partial<CompileOptions>) => Engine,
  options: { skip: string | false },
): void {
  test('a training loop gives the numbers of the run op by op', options, async () => {
    const [eager, traced] = [network(), network()];
    const graph = make();
    const step = graph.compile('step', traced.step);
    for (let t = 1; t <= 5; t++) {
      const feeds = eager.feeds(t);
      const expected = tf.tidy(() => eager.step(feeds));
      const actual = await step(feeds);
      close(actual.loss!, expected.loss!);
      close(actual.norm!, expected.norm!);
    }
    eager.variables.forEach((variable, i) => {
      close(traced.variables[i]!, variable);
    });
    const { calls, nodes } = graph.functions[0]!;
    assert.ok(calls > nodes && nodes > 30, `${calls} kernels, ${nodes} nodes`);
    graph.dispose();
    close(traced.variables[0]!, eager.variables[0]!);
  });

  test('one run repeats bit for bit on one thread', options, async () => {
    const runs: number[][] = [];
    for (let i = 0; i < 2; i++) {
      const { variables, step, feeds } = network();
      const graph = make({ verify: i === 0 }); // checked or not: the session's numbers count
      const compiled = graph.compile('step', step);
      for (let t = 1; t <= 4; t++) await compiled(feeds(t));
      runs.push(variables.flatMap(values));
      graph.dispose();
    }
    assert.deepEqual(runs[0], runs[1]);
  });

  test('functions share state, also when traced later, and new shapes are traced anew', options, async () => {
    const count = tf.variable(tf.scalar(0), false);
    const unused = tf.variable(tf.scalar(5), false);
    const graph = make();
    const add = graph.compile('add', ({ x }) => {
      count.assign(count.add(x!.sum()));
      return { count };
    });
    const scaled = graph.compile('scaled', ({ by }) => ({ y: count.mul(by!).add(unused) }));
    close((await add({ x: tf.tensor1d([1, 2]) })).count!, [3]);
    close((await add({ x: tf.tensor1d([1, 2]) })).count!, [6]);
    close((await scaled({ by: tf.scalar(10) })).y!, [65]);
    close((await add({ x: tf.tensor1d([1, 1, 1]) })).count!, [9]);
    close((await scaled({ by: tf.scalar(10) })).y!, [95]);
    close((await add({ x: tf.tensor1d([1, 2]) })).count!, [12]);
    assert.equal(graph.functions.length, 3);
    graph.dispose();
    close(count, [12]);
  });

  test('what is computed twice is one node; what nobody needs is none', options, async () => {
    const w = tf.variable(tf.randomNormal([6, 6], 0, 1, 'float32', 3), false);
    const graph = make();
    const nodes = (name: string) => graph.functions.find(f => f.name.startsWith(name))!.nodes;
    const forward = (x: tf.Tensor) => tf.softmax(tf.matMul(x.reshape([4, 6]), w).add(tf.scalar(0.5)));
    const once = graph.compile('once', ({ x }) => ({ y: forward(x!).square() }));
    const twice = graph.compile('twice', ({ x }) => {
      forward(x!).exp();
      return {
        y: forward(x!)
          .mul(forward(x!.cast('float32')))
          .reshape([4, 6]),
      };
    });
    const x = tf.randomNormal([4, 6], 0, 1, 'float32', 4);
    close((await once({ x })).y!, (await twice({ x })).y!, 1e-6);
    assert.equal(nodes('twice'), nodes('once'));
    graph.dispose();
  });

  test('a number that changes between calls is noticed, and the state stays', options, async () => {
    const w = tf.variable(tf.tensor1d([1, 2]), false);
    const graph = make();
    let lr = 1;
    const step = graph.compile('step', () => {
      w.assign(w.mul(lr));
      lr /= 2;
      return { w };
    });
    await step({});
    await assert.rejects(
      step({}),
      /^Error: step\(\): a constant that Multiply uses was 1 in the first call and is 0.5 now.*feed/,
    );
    close(w, [1, 2]);
    let calls = 0;
    const branch = graph.compile('branch', ({ x }) => ({ y: calls++ ? x!.square() : x!.exp() }));
    const x = tf.tensor1d([1]);
    await branch({ x });
    await assert.rejects(
      branch({ x }),
      /branch\(x: float32\[1\]\): a Square was recorded where the first call had Exp/,
    );
    const slope = graph.compile('slope', ({ x }) => ({ y: tf.leakyRelu(x!, calls++) }));
    await slope({ x });
    await assert.rejects(slope({ x }), /a LeakyRelu was recorded where the first call had another one/);
    const shorter = graph.compile('shorter', ({ x }) => ({ y: calls++ % 2 ? x!.neg() : x!.neg().exp() }));
    await shorter({ x });
    await assert.rejects(
      shorter({ x }),
      /a Neg for the end was recorded where the first call had Exp|a Exp was recorded where the first call had nothing/,
    );
    graph.dispose();
  });

  test('what a graph cannot do is refused with a reason', options, async () => {
    const graph = make();
    const x = tf.tensor1d([1, 2]);
    const w = tf.variable(tf.scalar(1), false);
    const big = tf.randomNormal([600, 600]);
    const refused = async (fn: (feeds: Feeds) => Feeds, reason: RegExp) => {
      await assert.rejects(graph.compile('f', fn)({ x }), reason);
    };
    await refused(({ x }) => ({ y: x!.sum().dataSync()[0]! > 0 ? x! : x!.neg() }), /a tensor was read/);
    await refused(({ x }) => ({ y: x!.dataSync()[0]! > 0 ? x! : x!.neg() }), /a tensor was read/);
    await refused(({ x }) => ({ y: w.dataSync()[0]! > 0 ? x! : x!.neg() }), /a tensor was read/);
    await refused(({ x }) => ({ y: big.mul(x!.sum()) }), /shape \[600,600\].*make it a tf.variable/);
    await refused(() => ({ y: tf.variable(tf.scalar(1)) }), /tf.variable was made/);
    w.assign(tf.scalar(3));
    const { y } = await graph.compile('after', ({ x }) => ({ y: x!.mul(w) }))({ x }); // and the graph still works
    close(y!, [3, 6]);
    graph.dispose();
  });

  test('a graph that disagrees with the run op by op is noticed', options, async () => {
    const w = tf.variable(tf.tensor1d([1, 2]), false, 'weight');
    const graph = make({ tolerance: -1 }); // nothing agrees that much
    const step = graph.compile('step', () => {
      w.assign(w.mul(2));
      return { sum: w.sum() };
    });
    await assert.rejects(step({}), /step\(\): .* disagree: sum by 0.0, weight by 0.0/);
    graph.dispose();
  });

  test('all kinds of outputs, ops and assignments', options, async () => {
    const graph = make();
    const seen = tf.variable(tf.tensor1d([0, 0], 'int32'), false);
    const flag = tf.variable(tf.tensor1d([true, false], 'bool'), false);
    const a = tf.variable(tf.scalar(1), false);
    const b = tf.variable(tf.scalar(2), false);
    const fn = ({ x, ids, on }: Feeds): Feeds => {
      const [left, right] = tf.split(x!, 2, 1);
      const { values: best, indices } = tf.topk(x!, 2);
      seen.assign(ids as tf.Tensor1D);
      flag.assign(on!.logicalNot());
      const old = a.clone();
      a.assign(b);
      b.assign(old);
      b.assign(b.add(a)); // sees both new values
      const mask = tf.linalg.bandPart(tf.ones([4, 4]), -1, 0);
      const rows = tf.gather(x!, ids!);
      return {
        right: right!.sub(left!),
        best,
        indices,
        positive: x!.greater(0),
        count: x!.greater(0).sum(),
        hot: tf.oneHot(ids!, 4),
        rows,
        gradient: tf.grad(y => tf.gather(y, ids!).square().sum())(x!),
        chosen: tf.where(x!.greater(0), x!, tf.zerosLike(x!)),
        attention: tf.matMul(tf.matMul(x!, x!, true, false).mul(mask), x!, false, true),
        joined: tf.concat([x!, tf.stack([left!, right!]).reshape([2, 4])], 1).cumsum(1, true),
        sum: a.add(b),
        padded: tf
          .pad(x! as tf.Tensor2D, [
            [0, 1],
            [1, 0],
          ])
          .transpose()
          .slice([1, 0], [2, 2]),
        sorted: tf.maximum(x!.erf(), x!.clipByValue(-0.5, 0.5)).logSumExp(1),
        fed: ids!,
        again: ids!,
      };
    };
    const compiled = graph.compile('all', fn);
    const feeds = (seed: number) => ({
      x: tf.randomNormal([2, 4], 0, 1, 'float32', seed),
      ids: tf.tensor1d([1, 0], 'int32'),
      on: tf.tensor1d([seed > 1, false], 'bool'),
    });
    for (let seed = 1; seed <= 3; seed++) {
      const fed = feeds(seed);
      const start = [a, b].map(variable => variable.clone());
      const actual = await compiled(fed);
      const state = [a, b, seen, flag].map(values);
      [a, b].forEach((variable, i) => {
        variable.assign(start[i]!);
      });
      const expected: Feeds = tf.tidy(() => fn(fed));
      assert.deepEqual([a, b, seen, flag].map(values), state);
      for (const [key, tensor] of Object.entries(expected)) {
        assert.deepEqual([actual[key]!.shape, actual[key]!.dtype], [tensor.shape, tensor.dtype], key);
        close(actual[key]!, tensor, 1e-6);
      }
    }
    const same = tf.tensor1d([1, 2]); // one tensor as two feeds
    const minus = graph.compile('minus', ({ p, q }) => ({ y: p!.sub(q!) }));
    close((await minus({ p: same, q: same })).y!, [0, 0]);
    close((await minus({ p: same, q: tf.zerosLike(same) })).y!, [1, 2]);
    close((await minus({ p: same, q: tf.onesLike(same) })).y!, [0, 1]);
    graph.dispose();
  });
}
