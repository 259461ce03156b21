/** The pipeline: in order, what is there is left alone, and what belongs to other components is made anew. */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { postprocess, type Steps } from './pipeline.ts';
import { componentsHash, type Flags, type Run } from './run-files.ts';

test('stages run in order, once; other components make them run again', async () => {
  const dir = mkdtempSync(join(tmpdir(), 'pipeline-'));
  const write = (name: string, value: object) => writeFileSync(join(dir, name), JSON.stringify(value));
  writeFileSync(join(dir, 'components.safetensors'), 'a');
  write('clusters.json', { formatVersion: 1, components: componentsHash(dir) });
  const run = { problem: { config: { out: dir } } } as unknown as Run;
  let calls: string[] = [];
  let code = 0;
  const steps: Steps = {
    harvest: async () => {
      calls.push('harvest');
      write('harvest.json', { formatVersion: 1, components: undefined, n: calls.length });
    },
    attributions: async (_, flags: Flags) => {
      calls.push(`attributions ${flags.minutes}`);
      if (code === 0) write('attributions.json', { formatVersion: 1, components: componentsHash(dir), targets: [] });
      return code;
    },
    page: async () => {
      calls.push('page');
      writeFileSync(join(dir, 'report.html'), '');
    },
  };
  const called = async (flags: Flags = {}) => {
    calls = [];
    const result = await postprocess(run, flags, steps);
    return [result, ...calls];
  };
  write('harvest.json', { formatVersion: 1 }); // of an unknown run: not trusted
  code = 1;
  assert.deepEqual(await called({ minutes: '3' }), [1, 'harvest', 'attributions 3'], 'a stage that fails ends it');
  code = 0;
  assert.deepEqual(await called(), [0, 'attributions undefined', 'page']);
  assert.deepEqual(await called(), [0]);
  rmSync(join(dir, 'report.html'));
  assert.deepEqual(await called(), [0, 'page']);
  utimesSync(join(dir, 'report.html'), 1, 1); // an earlier start ended before the page
  assert.deepEqual(await called(), [0, 'page']);
  write('harvest.json', { formatVersion: 1, changed: true });
  assert.deepEqual(await called(), [0, 'harvest', 'page']);
  writeFileSync(join(dir, 'components.safetensors'), 'b');
  const other = componentsHash(dir);
  write('clusters.json', { formatVersion: 1, components: other });
  assert.deepEqual(await called(), [0, 'harvest', 'attributions undefined', 'page']);
  assert.equal(JSON.parse(readFileSync(join(dir, 'postprocess.json'), 'utf8')).components, other);
  await assert.rejects(called({ answers: join(dir, 'none.jsonl') }), /none\.jsonl/);
  rmSync(dir, { recursive: true });
});
