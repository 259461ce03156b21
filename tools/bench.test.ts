import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';

const bench = (...args: string[]) => {
  const file = fileURLToPath(new URL('bench.ts', import.meta.url));
  const env = { ...process.env, PATH: '', PYTHON: '/no/python' }; // so nvidia-smi and Python are nowhere
  return spawnSync(process.execPath, ['--import', 'tsx', file, ...args], { encoding: 'utf8', env });
};

test('the bench ends with one line where it lacks a GPU, a Python, or a size', () => {
  const cases: [string[], number, RegExp][] = [
    [['--device', 'cuda'], 2, /^bench: --device cuda: no NVIDIA GPU here \(nvidia-smi finds none\)\n$/],
    [['--device', 'tpu'], 2, /^bench: --device: got tpu, takes cpu or cuda\n$/],
    [['--sizes', 'pile-4L'], 2, /^bench: --sizes: got pile-4L, takes toy, stories260K, .*\n$/],
    [['--engines', 'onnx,quick'], 2, /^bench: --engines: got quick, takes onnx, .*\n$/],
    [['--batch', 'x'], 2, /^bench: --batch: got x, takes a number of rows\n$/],
    [['--sizes', 'toy'], 1, /^bench: \/no\/python .*ENOENT.*\n$/],
    [['--child', 'tensorflow-tf32', '--sizes', 'toy'], 2, /^bench: --(engine|device).*\n$/], // no TensorFlow, or no GPU
  ];
  for (const [args, code, message] of cases) {
    const { status, stderr, stdout } = bench(...args);
    assert.match(stderr, message);
    assert.deepEqual([status, stdout], [code, '']);
  }
});
