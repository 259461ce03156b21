import assert from 'node:assert/strict';
import { test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import type { BackendWasm } from '@tensorflow/tfjs-backend-wasm';
import { checkSize, estimateStep } from './estimate.ts';
import { close, graphCases, network, values } from './graph.cases.ts';
import { loadOnnxRuntime, onnxCompiler, overwritable } from './onnxruntime.ts';
import { registerUniform } from './random.ts';
import { record } from './record.ts';
import { startWasm } from './wasm.ts';

await startWasm();
registerUniform();
const ort = await loadOnnxRuntime().catch((error: Error) => error);
const options = { skip: ort instanceof Error && ort.message };
const make = (given: object = {}) =>
  onnxCompiler(ort as Exclude<typeof ort, Error>, { threads: 1, tolerance: 1e-3, products: 2 ** -16, ...given });
graphCases(make, options);

test('a run repeats bit for bit, with one thread and with two', options, async () => {
  for (const threads of [1, 2]) {
    const runs: number[][] = [];
    for (let i = 0; i < 2; i++) {
      const { variables, step, feeds } = network();
      const graph = make({ threads });
      const compiled = graph.compile('step', step);
      for (let t = 1; t <= 4; t++) await compiled(feeds(t));
      runs.push(variables.flatMap(values));
      await graph.dispose();
    }
    assert.deepEqual(runs[0], runs[1]);
  }
});

test('who holds a clone of a variable keeps its value; one that was assigned outside is used', options, async () => {
  const w = tf.variable(tf.tensor1d([0.1, 1, 2, 3]), false);
  const graph = make();
  const double = graph.compile('double', () => {
    w.assign(w.mul(2));
    return {};
  });
  const held: tf.Tensor[] = [];
  for (let i = 0; i < 5; i++) {
    held.push(w.clone());
    await double({});
  }
  assert.deepEqual(
    held.map(x => x.dataSync()[1]),
    [1, 2, 4, 8, 16],
  );
  w.assign(tf.tensor1d([1, 1, 1, 7]));
  await double({});
  assert.deepEqual(values(w), [2, 2, 2, 14]);
  await graph.dispose();
});

test('products op by op see what a run has moved', options, async () => {
  const w = tf.variable(tf.ones([8, 8]), false);
  const graph = make();
  const double = graph.compile('double', () => {
    w.assign(w.mul(2));
    return {};
  });
  for (let i = 0; i < 6; i++) {
    const product = tf.matMul(tf.ones([4, 8]), w); // the backend keeps a packed copy of its right factor
    assert.deepEqual(values(product), Array(32).fill(8 * 2 ** i));
    await double({});
  }
  await graph.dispose();
});

test('a kernel that the recorder does not know runs op by op, and one line says so', options, async () => {
  const graph = make();
  const w = tf.variable(tf.scalar(1), false);
  const lines: string[] = [];
  const { write } = process.stderr;
  process.stderr.write = (line => lines.push(String(line)) > 0) as typeof write;
  const f = graph.compile('f', ({ x }) => {
    w.assign(w.add(1));
    return { y: tf.mod(x!, tf.scalar(3)) };
  });
  const results: number[][] = [];
  try {
    for (let i = 0; i < 3; i++) results.push(values((await f({ x: tf.tensor1d([4, 5]) })).y!));
  } finally {
    process.stderr.write = write;
  }
  assert.deepEqual(results, Array(3).fill([1, 2]));
  assert.deepEqual(values(w), [4]);
  assert.deepEqual(lines, ['engine   f runs op by op: the kernel Mod is not known to the recorder\n']);
  await graph.dispose();
});

test('memory stays flat, also while functions are called at the same time', options, async () => {
  const { variables, step, feeds } = network();
  const graph = make();
  const compiled = graph.compile('step', step);
  const fed = feeds(1);
  const together = async (n: number) => tf.dispose(await Promise.all(Array.from({ length: n }, () => compiled(fed))));
  for (let i = 0; i < 4; i++) await together(1);
  const backend = tf.backend() as BackendWasm;
  const { wasm } = backend as unknown as { wasm: { HEAPU8: Uint8Array } };
  const [held, heap] = [[tf.memory().numTensors, backend.numDataIds()], wasm.HEAPU8.length];
  for (let i = 0; i < 60; i++) {
    await together(3);
    if (i % 10 === 0) variables[0]!.dataSync();
  }
  assert.deepEqual([tf.memory().numTensors, backend.numDataIds()], held);
  assert.equal(wasm.HEAPU8.length, heap);
  await graph.dispose();
  assert.equal(tf.memory().numTensors, held[0]! - 1); // the second buffer of w2: the gradient of w1 may read it late
});

test('a sum of very many numbers is exact to a few roundings', options, async () => {
  const graph = make({ verify: false });
  const n = 2 ** 24 * 3; // one after another in float32 they end at 2²⁴ for each of the few numbers that are added to
  const x = tf.variable(tf.fill([n], 1.5), false);
  const sums = graph.compile('sums', () => ({ sum: x.sum(), squares: x.square().sum() }));
  const { sum, squares } = await sums({});
  close([sum!.dataSync()[0]! / n, squares!.dataSync()[0]! / n], [1.5, 2.25], 1e-5);
  x.dispose();
  await graph.dispose();
});

/** The fields of a protobuf message that are messages or strings, by number. */
function fieldsOf(bytes: Uint8Array): Map<number, Uint8Array[]> {
  const fields = new Map<number, Uint8Array[]>();
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let shift = 1; ; shift *= 128) {
      const byte = bytes[at++]!;
      value += (byte & 127) * shift;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    if (tag % 8 === 0) varint();
    else if (tag % 8 === 5) at += 4;
    else {
      assert.equal(tag % 8, 2);
      const size = varint();
      fields.set(tag >> 3, [...(fields.get(tag >> 3) ?? []), bytes.subarray(at, at + size)]);
      at += size;
    }
  }
  assert.equal(at, bytes.length);
  return fields;
}

test('the picture of a function is an ONNX file whose names say which functions made a node', options, async () => {
  const graph = make();
  const w = tf.variable(tf.fill([3, 3], 0.5), false);
  function smallLoss(x: tf.Tensor) {
    return tf
      .matMul(x as tf.Tensor2D, w as never)
      .square()
      .mean() as tf.Scalar;
  }
  const compiled = graph.compile('training step', ({ x, rate }) => {
    function update(gradient: tf.Tensor) {
      w.assign(w.sub(gradient.mul(rate!)));
    }
    const { value, grads } = tf.valueAndGrads(() => smallLoss(x!))([w]);
    update(grads[0]!);
    return { loss: value };
  });
  await compiled({ x: tf.ones([2, 3]), rate: tf.scalar(0.1) });
  const { name, nodes, bytes } = graph.picture();
  assert.match(name, /^training step/);
  const text = (bytes = Buffer.alloc(0) as Uint8Array) => Buffer.from(bytes).toString();
  const parts = fieldsOf(fieldsOf(bytes).get(7)![0]!);
  const places = parts.get(1)!.map(node => text(fieldsOf(node).get(3)?.[0]).replace(/_\d+$/, ''));
  assert.ok(places.length >= nodes && nodes > 5);
  for (const place of ['smallLoss/MatMul', 'smallLoss/gradient/FusedMatMul', 'update/Sub'])
    assert.ok(places.includes(place), `${place} is not in ${places}`);
  const namesOf = (field: number) => parts.get(field)!.map(value => text(fieldsOf(value).get(1)?.[0]));
  assert.deepEqual(namesOf(11).sort(), ['rate', `state/${w.name}`, 'x']);
  assert.deepEqual(namesOf(12).sort(), ['loss', `state/${w.name}/new`]);
  await graph.dispose();
});

test('a variable is overwritten in place only after its last use', options, async () => {
  const [a, b, c, d] = [1, 2, 3, 4].map(x => tf.variable(tf.fill([64, 64], x), false)) as [
    tf.Variable,
    tf.Variable,
    tf.Variable,
    tf.Variable,
  ];
  const fn = () => {
    const sum = a.add(b); // needed by nothing that moves c
    const product = tf.matMul(c, c).mul(2 ** -12);
    a.assign(b.add(0)); // a and b change places
    b.assign(sum.sub(b));
    c.assign(c.add(product.mean()));
    d.assign(c.transpose()); // reads the new c
    return { product: product.mean(), sum: sum.mean(), late: d.mul(2).mean() };
  };
  const inPlace = overwritable(record({}, fn));
  assert.deepEqual(
    [a, b, c, d].map(x => inPlace.has(x)),
    [false, false, true, true],
  );
  const late = tf.variable(tf.ones([4]), false);
  const another = () => {
    const used = late.square();
    late.assign(late.add(1));
    return { used };
  };
  assert.equal(overwritable(record({}, another)).size, 0); // the square may come after the sum
  const aliased = () => {
    const column = late.reshape([4, 1]); // no copy in ONNX Runtime
    late.assign(late.add(column.sum()));
    return { used: column.square() };
  };
  assert.equal(overwritable(record({}, aliased)).size, 0);
  const graph = make();
  const compiled = graph.compile('fn', fn);
  const first = [a, b, c, d].map(x => x.dataSync()[0]!);
  for (let i = 0; i < 5; i++) await compiled({});
  const moved = [a, b, c, d].map(x => x.dataSync()[0]!);
  [a, b, c, d].forEach((x, i) => {
    x.assign(tf.fill(x.shape, first[i]!));
  });
  for (let i = 0; i < 5; i++) tf.tidy(fn);
  close(
    moved,
    [a, b, c, d].map(x => x.dataSync()[0]!),
  );
  await graph.dispose();
});

test('a state that does not fit into the heap of WASM with what its check takes is refused before it is made', () => {
  const config = { ciDModel: 8, ciNBlocks: 1, ciMlpHidden: 8, ciNHeads: 1, seqLen: 32, batchSize: 4 };
  const sizes = (C: number) => ({
    target: { weights: new Map() },
    arch: { vocab: 10, dModel: 8 },
    modules: [{ dIn: 8, dOut: 8, C }],
    ciShapes: {},
    config: { ...config, microBatches: 1, ppgdInnerSteps: 2 },
  });
  const said: string[] = [];
  const check = (C: number) => checkSize(sizes(C), { heapLimit: 2 ** 31 }, line => said.push(line));
  check(1000);
  assert.equal(said.length, 2);
  assert.throws(() => check(2_000_000), {
    name: 'UsageError',
    message: /state and its check take .*GiB, and this engine holds 2\.00/,
  });
});

test('the estimate is within a quarter of the peaks that were measured, on every engine', () => {
  // processes of --dry-run on a two-core Linux machine, in MiB; the second of each pair with --micro-batches 2
  const module = (dIn: number, dOut: number, C: number) => ({ dIn, dOut, C });
  const toy = [...Array(4).fill(module(48, 48, 48)), module(48, 192, 128), module(192, 48, 128)];
  const [d, kv, hidden] = [64, 32, 172];
  const layer = [
    [d, d],
    [d, kv],
    [d, kv],
    [d, d],
    [d, hidden],
    [d, hidden],
    [hidden, d],
  ] as const;
  const stories = Array.from({ length: 5 }, () => layer.map(([dIn, dOut]) => module(dIn, dOut, 64))).flat();
  const pile = [
    ...Array(2).fill(module(768, 768, 512)),
    ...Array(2).fill(module(768, 768, 1024)),
    ...[module(768, 3072, 3072), module(3072, 768, 3584)],
  ];
  const sizes = {
    toy: {
      ...{ target: { weights: new Map([['all', { size: 32_000 }]]) }, arch: { vocab: 89, dModel: 48 }, modules: toy },
      ...{ ciShapes: { all: [110_000] }, seqLen: 32, batchSize: 16, ciDModel: 64, ciNBlocks: 1, ciMlpHidden: 256 },
    },
    stories: {
      ...{
        target: { weights: new Map([['all', { size: 260_000 }]]) },
        arch: { vocab: 512, dModel: d },
        modules: stories,
      },
      ...{ ciShapes: { all: [1_080_000] }, seqLen: 64, batchSize: 8, ciDModel: 128, ciNBlocks: 2, ciMlpHidden: 512 },
    },
    'pile-4L': {
      ...{ target: { weights: new Map([['all', { size: 67_000_000 }]]) }, arch: { vocab: 50_277, dModel: 768 } },
      ...{ modules: Array(4).fill(pile).flat(), ciShapes: { all: [539_000_000] }, seqLen: 512, batchSize: 4 },
      ...{ ciDModel: 2048, ciNBlocks: 8, ciMlpHidden: 8192 },
    },
  };
  const measured: Record<string, Partial<Record<keyof typeof sizes, number[]>>> = {
    onnx: { toy: [410, 381], stories: [688, 674] },
    tensorflow: { toy: [630, 618], stories: [1033, 846] },
    xla: { toy: [1003, 1055], stories: [1854, 2213] },
    wasm: { toy: [339, 289], stories: [998, 682] },
    cuda: { toy: [661], stories: [853], 'pile-4L': [33_377] }, // what an H100 gave away, `npm run bench -- --device cuda`
  };
  for (const [name, peaks] of Object.entries(measured))
    for (const [size, both] of Object.entries(peaks))
      for (const [i, peak] of both.entries()) {
        const { ciDModel, ciNBlocks, ciMlpHidden, seqLen, batchSize, ...rest } = sizes[size as keyof typeof sizes];
        const shards = { ciNHeads: 4, microBatches: i + 1, ppgdInnerSteps: 2 };
        const config = { ciDModel, ciNBlocks, ciMlpHidden, seqLen, batchSize, ...shards };
        const place = name === 'cuda' ? { name: 'tensorflow', gpu: true } : { name, xla: name === 'xla' };
        const { bytes } = estimateStep({ ...rest, config }, place);
        assert.ok(
          Math.abs(bytes / 2 ** 20 / peak - 1) < 0.25,
          `${name}, ${size}, ${i + 1}: ${bytes / 2 ** 20}, not ${peak}`,
        );
      }
});

test('the estimate counts what Muon adds: five times X Xᵀ, its square and a product with X', () => {
  const sizes = {
    ...{ target: { weights: new Map() }, arch: { vocab: 1, dModel: 1 }, modules: [{ dIn: 2, dOut: 3, C: 4 }] },
    ciShapes: { matrix: [6, 5], vector: [7] },
  };
  const config = { ciDModel: 5, ciNBlocks: 1, ciMlpHidden: 6, ciNHeads: 1, seqLen: 1, batchSize: 1, microBatches: 1 };
  const flops = (optimizer: string) =>
    estimateStep({ ...sizes, config: { ...config, ppgdInnerSteps: 2, optimizer } }).flops;
  const multiplied = 2 * (2 * 4 * 2) + 2 ** 3 + 2 * (3 * 4 * 3) + 3 ** 3 + 2 * (5 * 6 * 5) + 5 ** 3;
  assert.equal(flops('muon') - flops('adamw'), 5 * 2 * multiplied);
});
