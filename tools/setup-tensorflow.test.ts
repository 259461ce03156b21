/** Offline and fast: nothing is downloaded or compiled. What needs TensorFlow runs if it is installed. */
import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { type TestContext, test } from 'node:test';
import util from 'node:util';
import * as tf from '@tensorflow/tfjs';
import { Graph } from '../engine/graph.ts';
import { loadTensorFlow, useBf16Products } from '../engine/tensorflow.ts';
import { cacheRoot, cudaRequirements, parseOptions, publish, wheelName } from './setup-tensorflow.ts';

const PROJECT = path.resolve(import.meta.dirname, '..');
const SCRIPT = ['--import', 'tsx', path.join(import.meta.dirname, 'setup-tensorflow.ts')];
const runsHere = process.platform === 'linux' && (process.arch === 'x64' || process.arch === 'arm64');

function temporaryFolder(t: TestContext): string {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'setup-tensorflow-'));
  t.after(() => fs.rmSync(folder, { recursive: true, force: true }));
  return folder;
}

test('options: defaults, and refusals that name the flag', () => {
  assert.deepEqual({ ...parseOptions([]) }, { gpu: false, check: false, help: false, version: '2.21.0' });
  assert.equal(parseOptions(['--gpu', '--version', '2.22.0rc1']).version, '2.22.0rc1');
  assert.throws(() => parseOptions(['--cuda']), { message: /--cuda/, exitCode: 2 });
  for (const bad of [['--version', 'latest'], ['--version', '2.21'], ['--version']])
    assert.throws(() => parseOptions(bad), { message: /--version/, exitCode: 2 });
  const { status, stdout, stderr } = spawnSync(process.execPath, [...SCRIPT, '--cuda'], { cwd: PROJECT });
  assert.deepEqual([status, String(stdout)], [2, '']);
  assert.match(String(stderr), /^setup-tensorflow: Unknown option '--cuda'\n/);
});

test('the cache: the variable, then XDG_CACHE_HOME, then ~/.cache', () => {
  assert.equal(cacheRoot({ NANO_TENSORFLOW_CACHE: '/a', XDG_CACHE_HOME: '/x' }), '/a');
  assert.equal(cacheRoot({ NANO_TENSORFLOW_CACHE: '', XDG_CACHE_HOME: '/x' }), '/x/nano-param-decomp');
  assert.equal(cacheRoot({}), path.join(os.homedir(), '.cache/nano-param-decomp'));
});

test('the wheel for a platform, or one line that says why there is none', () => {
  assert.equal(wheelName(false, 'linux', 'x64', '2.36'), 'tensorflow-cpu');
  assert.equal(wheelName(true, 'linux', 'x64', '2.36'), 'tensorflow');
  assert.equal(wheelName(false, 'linux', 'arm64', '2.36'), 'tensorflow');
  assert.throws(() => wheelName(true, 'linux', 'arm64', '2.36'), /with CUDA for linux arm64.*x86_64; other engines/);
  assert.throws(() => wheelName(false, 'darwin', 'arm64', undefined), /for darwin arm64: it takes Linux/);
  assert.throws(() => wheelName(false, 'linux', 'x64', ''), /linux x64 without glibc/);
});

test('the CUDA packages are those of the extra, and only those', () => {
  const metadata = `Metadata-Version: 2.1
Requires-Dist: numpy>=1.26.0
Requires-Dist: nvidia-cublas-cu12<13.0,>=12.5.3.2; extra == "and-cuda"
Requires-Dist: nvidia-nccl-cu12 (<3.0,>=2.27.7) ; (sys_platform == 'linux') and extra == 'and-cuda'
Requires-Dist: tensorflow-io-gcs-filesystem>=0.23.1; sys_platform != "win32" and extra == "gcs-filesystem"
Provides-Extra: and-cuda`;
  const expected = ['nvidia-cublas-cu12<13.0,>=12.5.3.2', 'nvidia-nccl-cu12 (<3.0,>=2.27.7)'];
  assert.deepEqual(cudaRequirements(metadata), expected);
});

test('a folder is published whole or not at all', async t => {
  const target = path.join(temporaryFolder(t), 'target');
  const write = (text: string) => async (folder: string) => fs.writeFileSync(path.join(folder, 'file'), text);
  const read = () => fs.readFileSync(path.join(target, 'file'), 'utf8');
  fs.mkdirSync(`${target}.partial-999999999`); // of a process that was killed
  await publish(target, write('one'));
  assert.equal(read(), 'one');
  const fail = async (folder: string) => {
    await write('half')(folder);
    throw new Error('broken');
  };
  await assert.rejects(publish(target, fail), /broken/);
  assert.equal(read(), 'one');
  await publish(target, write('two'));
  assert.equal(read(), 'two');
  assert.deepEqual(fs.readdirSync(path.dirname(target)), ['target']);
});

test('missing programs are named in one line before anything is made', { skip: !runsHere }, t => {
  const folder = temporaryFolder(t);
  const env = { PATH: folder, NANO_TENSORFLOW_CACHE: path.join(folder, 'cache') };
  const { status, stderr } = spawnSync(process.execPath, SCRIPT, { cwd: PROJECT, env });
  assert.equal(status, 1);
  assert.match(String(stderr), /^setup-tensorflow: missing here: Python 3, pip, npm, g\+\+ \(.*apt install.*\)\n$/);
  assert.deepEqual(fs.readdirSync(folder), []);
});

test('an interrupt ends the download and leaves nothing half-made', { skip: !runsHere }, async t => {
  const folder = temporaryFolder(t);
  const download = 'case "$*" in *download*) echo part >"$TMPDIR/part"; sleep 60;; esac';
  for (const name of ['python3', 'npm', 'g++'])
    fs.writeFileSync(path.join(folder, name), `#!/bin/sh\n${download}\n`, { mode: 0o755 });
  const cache = path.join(folder, 'cache');
  const env = { ...process.env, PATH: `${folder}:${process.env.PATH}`, NANO_TENSORFLOW_CACHE: cache };
  const child = spawn(process.execPath, SCRIPT, { cwd: PROJECT, env, stdio: ['ignore', 'ignore', 'pipe'] });
  const files = () => (fs.existsSync(cache) ? fs.readdirSync(cache, { recursive: true }).map(String) : []);
  let talk = '';
  child.stderr.on('data', text => {
    talk += text;
  });
  const exit = once(child, 'exit');
  while (child.exitCode === null && !files().some(name => name.endsWith('part'))) await util.promisify(setTimeout)(50);
  child.kill('SIGINT');
  assert.deepEqual((await exit)[0], 130, talk);
  assert.match(talk, /^downloading tensorflow\S* .*\nsetup-tensorflow: interrupted;.*\n$/);
  const version = 'tensorflow-2.21.0-cpu';
  assert.deepEqual(files().sort(), [version, `${version}/library-wheels`]);
});

// ---- With TensorFlow, if it is installed ------------------------------------------------------------------------

// As in Node 23, where these are gone; and with flags that the package's loader would take for its own.
for (const name of ['isArray', 'isNullOrUndefined']) Reflect.deleteProperty(util, name);
const flags = ['--directory', '/nonexistent', '--C', '32'];
process.argv.push(...flags);
const engine = await loadTensorFlow({ threads: 1 }).catch((error: Error) => error);
const absent = engine instanceof Error && engine.message;

test('loading tells the version, or in one line what to do', () => {
  assert.deepEqual(process.argv.splice(-4), flags);
  if (absent)
    return assert.match(absent, /^TensorFlow (is not installed|does not load \(.*\)): run `npm run tensorflow`$/);
  assert.match((engine as { version: string }).version, /^\d+\.\d+/);
  assert.equal(tf.getBackend(), 'tensorflow');
  assert.deepEqual(tf.topk([3, 1, 2], 2).values.arraySync(), [3, 2]); // calls util.isNullOrUndefined
});

test('bf16 products', { skip: absent }, async t => {
  useBf16Products();
  // the exact product, without a matrix product: [.., n, 1, k] · [.., 1, m, k] summed over k
  const exact = (a: tf.Tensor, b: tf.Tensor) => tf.sum(tf.mul(tf.expandDims(a, -2), tf.expandDims(b, -3)), -1);
  const relativeError = (got: tf.Tensor, expected: tf.Tensor) =>
    tf.div(tf.norm(tf.sub(got, expected)), tf.norm(expected)).dataSync()[0]!;
  const swap = (x: tf.Tensor) => tf.transpose(x, x.rank === 2 ? [1, 0] : [0, 2, 1]);

  await t.test('are rounded as bfloat16, transposed and batched too, and give float32', () => {
    for (const batch of [[], [3]])
      for (const transposeA of [false, true])
        for (const transposeB of [false, true]) {
          const a = tf.randomNormal([...batch, 8, 64], 0, 1, 'float32', 1);
          const b = tf.randomNormal([...batch, 16, 64], 0, 1, 'float32', 2); // as [m, k]
          const product = tf.matMul(transposeA ? swap(a) : a, transposeB ? b : swap(b), transposeA, transposeB);
          assert.deepEqual([product.shape, product.dtype], [[...batch, 8, 16], 'float32']);
          const error = relativeError(product, exact(a, b));
          assert.ok(error > 1e-4 && error < 1e-2, `relative error ${error}`); // float32 would have 1e-7
        }
  });
  await t.test('are exact for small integers, and other types keep the stock kernel', () => {
    const [a, b] = [tf.range(0, 64).reshape([8, 8]), tf.eye(8)];
    assert.equal(relativeError(tf.matMul(a, b), a), 0);
    const large = tf.tensor2d([[1_000_003]], [1, 1], 'int32');
    assert.deepEqual(tf.matMul(large, tf.onesLike(large)).arraySync(), [[1_000_003]]);
  });
  await t.test('reach the gradients and the fused product, and leak no tensor', () => {
    const a = tf.randomNormal([8, 64], 0, 1, 'float32', 3);
    const w = tf.randomNormal([64, 16], 0, 1, 'float32', 4) as tf.Tensor2D;
    const before = tf.memory().numTensors;
    tf.tidy(() => {
      const gradient = tf.grad(x => tf.sum(tf.square(tf.matMul(x as tf.Tensor2D, w))))(a);
      const error = relativeError(gradient, exact(tf.mul(exact(a, swap(w)), 2), w));
      assert.ok(error > 1e-4 && error < 1e-2, `relative error ${error}`);
      const fused = tf.fused.matMul({ a: tf.tensor2d([[1.001]]), b: tf.tensor2d([[1]]), bias: tf.tensor1d([2]) });
      assert.deepEqual(fused.arraySync(), [[3]]);
    });
    assert.equal(tf.memory().numTensors, before);
  });
  await t.test('become a graph, forward and backward', async () => {
    const graph = new Graph({ bf16: true, tolerance: 0.03, products: 2 ** -6 });
    const w = tf.variable(tf.randomNormal([64, 16], 0, 1, 'float32', 5), false);
    const step = graph.compile('step', ({ x }) => {
      const [gradient] = tf.grads(w => tf.sum(tf.square(tf.matMul(x as tf.Tensor2D, w as tf.Tensor2D))))([w]);
      w.assign(tf.sub(w, tf.mul(1e-3, gradient!)));
      return { y: tf.matMul(x as tf.Tensor2D, w as tf.Tensor2D) };
    });
    const x = tf.randomNormal([8, 64], 0, 1, 'float32', 6);
    for (let i = 0; i < 3; i++) {
      const { y } = await step({ x });
      const error = relativeError(y!, exact(x, swap(w)));
      assert.ok(error > 1e-4 && error < 1e-2, `relative error ${error}`);
    }
    graph.dispose();
  });
  await t.test('go through whatever binding the backend has at the call, as tracing needs', () => {
    const backend = tf.backend() as unknown as { binding: Record<string, unknown> };
    const real = backend.binding;
    const ops: unknown[] = [];
    const record = (...args: unknown[]) => {
      ops.push(args[0]);
      return (real.executeOp as (...args: unknown[]) => unknown)(...args);
    };
    backend.binding = new Proxy({}, { get: (_, name: string) => (name === 'executeOp' ? record : real[name]) });
    try {
      tf.matMul(tf.ones([2, 2]), tf.ones([2, 2])).dataSync();
    } finally {
      backend.binding = real;
    }
    assert.deepEqual(ops.slice(-4), ['Cast', 'Cast', 'BatchMatMulV2', 'Cast']);
  });
});
