/** The lessons in short forms: each runs from its flags to its page, and already finds something. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import * as fs from 'node:fs';
import * as os from 'node:os';
import * as path from 'node:path';
import { after, test } from 'node:test';
import { fileURLToPath } from 'node:url';

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'lessons-'));
after(() => fs.rmSync(folder, { recursive: true }));

function lesson(name: string, ...args: string[]) {
  const file = fileURLToPath(new URL(`${name}.ts`, import.meta.url));
  const { stdout, stderr, status } = spawnSync(process.execPath, ['--import', 'tsx', file, ...args], {
    encoding: 'utf8',
  });
  return { stdout, stderr, status };
}
function marksOf(name: string, ...args: string[]) {
  const out = path.join(folder, `${name}${args.join('')}`);
  const { stdout, stderr, status } = lesson(name, ...args, '--out', out, '--threads', '1');
  assert.equal(status, 0, stderr);
  assert.ok(fs.existsSync(path.join(out, 'components.safetensors')) && fs.existsSync(path.join(out, 'report.html')));
  return {
    marks: JSON.parse(stdout.trim().split('\n').at(-1)!),
    harvest: readJson(path.join(out, 'harvest.json')),
    stdout,
  };
}
const readJson = (file: string) => JSON.parse(fs.readFileSync(file, 'utf8'));

test('own-network: three components a layer, each along one of the known mechanisms', () => {
  const out = path.join(folder, 'own');
  const { stdout, stderr, status } = lesson('own-network', out);
  assert.equal(status, 0, stderr);
  assert.match(stdout, /MSE .*mean squared error/);
  const found = [...stdout.matchAll(/^(in|out):\d+ {2}\((.+)\) -> \((.+)\)$/gm)];
  const direction = (text: string) => text.trim().split(/\s+/).map(Number);
  const cosine = (a: number[], b: number[]) => a.reduce((total, x, i) => total + x * b[i]!, 0);
  for (const layer of ['in', 'out']) {
    const components = found
      .filter(([, path]) => path === layer)
      .map(([, , reads, writes]) => {
        const [alone, pair] =
          layer === 'in' ? [direction(reads!), direction(writes!)] : [direction(writes!), direction(reads!)];
        const k = alone.map(Math.abs).indexOf(Math.max(...alone.map(Math.abs)));
        const truth = Array.from({ length: 6 }, (_, i) => (i === 2 * k ? 0.8 : i === 2 * k + 1 ? 0.6 : 0));
        assert.ok(Math.abs(alone[k]!) > 0.95 && Math.abs(cosine(pair, truth)) > 0.95, `${layer}: ${alone} and ${pair}`);
        return k;
      });
    assert.deepEqual(components.sort(), [0, 1, 2], `the mechanisms found in ${layer}`);
  }
  const { inputs, components } = readJson(path.join(out, 'harvest.json'));
  assert.equal(inputs, 'features');
  const alive = components.filter((c: { meanCi: number }) => c.meanCi > 0.01);
  assert.equal(alive.length, 6);
  for (const { module, index, input } of alive) {
    const [first, second] = input.top.map(([, , pmi]: [number, number, number]) => pmi);
    assert.ok(
      first > 1 && (second ?? 0) < 0.3,
      `${module}:${index} goes with one feature: PMI ${first}, then ${second}`,
    );
  }
});

test('tms: half of the steps finds the features', () => {
  const { marks } = marksOf('tms', '--size', '5-2', '--steps', '700');
  assert.ok(marks.mmcs > 0.95, `MMCS ${marks.mmcs}`);
  assert.ok(marks.l0 < 1, `L0 ${marks.l0}: 0.5 is one component a layer for each feature that is there`);
  assert.ok(marks.reconstruction < 0.2 * marks.nothingOn, `${marks.reconstruction} of ${marks.nothingOn}`);
});

test('residual-mlp and induction-heads run from flags to marks, and page', () => {
  const residual = marksOf('residual-mlp', '--layers', '1', '--steps', '12');
  assert.equal(residual.harvest.inputs, 'features');
  assert.ok(residual.marks.identityCiError > 100, 'twelve steps have found nothing yet');
  const induction = marksOf('induction-heads', '--rows', '32', '--steps', '20');
  assert.ok(induction.marks.targetAccuracy < 0.5, 'a target of few steps has no heads yet');
  assert.equal(induction.harvest.inputs, undefined);
  assert.ok(induction.harvest.passages.length > 0);
  assert.match(induction.stdout, /layer 1, end/);
});

test('a wrong flag is refused in one line, exit code 2', () => {
  for (const args of [['--size', '6-2'], ['--sizes', '5-2'], ['--seed', '1.5'], ['--steps']]) {
    const { stderr, status } = lesson('tms', ...args);
    assert.equal(status, 2);
    assert.match(stderr, /^tms: .* takes .*$/m);
    assert.doesNotMatch(stderr, /\n\s+at /);
  }
});
