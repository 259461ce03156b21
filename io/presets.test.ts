/** Presets whose sizes follow the target. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { chooseModules } from '../nano-param-decomp.ts';
import { commandLine } from './flags.ts';
import { componentsByRank, PRESETS, type Sized } from './presets.ts';

/** The linear layers of a Llama. */
function llama(dModel: number, dKv: number, dMlp: number, nLayers: number): Sized {
  const of = (i: number) =>
    Object.entries({
      ...{ 'self_attn.q_proj': [dModel, dModel], 'self_attn.k_proj': [dModel, dKv], 'self_attn.v_proj': [dModel, dKv] },
      ...{ 'self_attn.o_proj': [dModel, dModel], 'mlp.gate_proj': [dModel, dMlp] },
      ...{ 'mlp.up_proj': [dModel, dMlp], 'mlp.down_proj': [dMlp, dModel] },
    }).map(([name, [dIn, dOut]]) => ({ path: `model.layers.${i}.${name}`, dIn: dIn!, dOut: dOut! }));
  return { arch: { dModel }, linears: Array.from({ length: nLayers }, (_, i) => of(i)).flat() };
}
const sizesOf = (target: Sized) => PRESETS['small-lm']!.sizes!(target);

test('small-lm at stories260K: nearly the sizes that were tried there', () => {
  const target = llama(64, 32, 172, 5);
  assert.deepEqual(sizesOf(target), {
    components: [
      'model.layers.*.self_attn.q_proj=64',
      'model.layers.*.self_attn.k_proj=48',
      'model.layers.*.self_attn.v_proj=48',
      'model.layers.*.self_attn.o_proj=64',
      'model.layers.*.mlp.gate_proj=120',
      'model.layers.*.mlp.up_proj=120',
      'model.layers.*.mlp.down_proj=120',
    ].join(),
    ...{ seqLen: 64, ciDModel: 96, ciMlpHidden: 384 },
  });
});

test('every matrix has at least its rank, at most about twice that, and no rule takes another matrix', () => {
  const odd: Sized['linears'] = [
    { path: 'h.0.attn.c_attn', dIn: 12, dOut: 36 },
    { path: 'h.0.mlp.c_fc', dIn: 12, dOut: 50 },
    { path: 'h.1.attn.c_attn', dIn: 12, dOut: 36 },
    { path: 'h.1.mlp.c_fc', dIn: 12, dOut: 5 }, // not as wide as that of the other block
    { path: 'h.11.mlp.c_fc', dIn: 12, dOut: 50 },
  ];
  for (const linears of [llama(64, 32, 172, 5).linears, llama(128, 8, 512, 2).linears, odd]) {
    const modules = chooseModules(linears, componentsByRank(linears));
    assert.equal(modules.length, linears.length);
    for (const { path, dIn, dOut, C } of modules) {
      const rank = Math.min(dIn, dOut);
      assert.ok(C >= rank && C < 2 * rank + 8, `${path}: ${C} components, rank ${rank}`);
      assert.equal(C, 8 * Math.ceil(Math.min(2 * rank, (dIn + dOut) / 2) / 8), path);
    }
  }
});

test('the command line gives what was not given itself; a run that goes on has its sizes in its record', () => {
  const program = {
    version: '0',
    jobs: {},
    groups: {
      all: {
        ...{ model: { value: '', help: '', place: true }, out: { value: '', help: '', place: true } },
        components: { value: 'auto', help: '' },
        ciDModel: { value: 0, help: '', max: 1e6 },
      },
    },
  };
  const target = llama(64, 32, 172, 5);
  const line = (...args: string[]) => commandLine(args, program)!;
  const all = sizesOf(target);
  assert.deepEqual(line('--preset=small-lm', '--model=m').sizes(target), all);
  const { components: _, ...others } = all;
  assert.deepEqual(line('--preset=small-lm', '--model=m', '--components=*=7').sizes(target), others);
  assert.deepEqual(line('--preset=toy').sizes(target), {});
  assert.deepEqual(line('--model=m').sizes(target), {});

  const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'older-'));
  try {
    // of a version that had no ciDModel yet
    fs.writeFileSync(path.join(dir, 'config.json'), '{"formatVersion":1,"config":{"components":"*=3"},"seed":1}');
    const { old } = line('--resume', `--out=${dir}`);
    assert.deepEqual(old!.config, { model: '', out: '', components: '*=3', ciDModel: 0 });
  } finally {
    fs.rmSync(dir, { recursive: true });
  }
});

test('a boolean field is turned off by --no-NAME and on by --NAME, the last one counts; the record of a run without it', () => {
  const groups = { all: { out: { value: '', help: '', place: true }, saveAll: { value: true, help: '' } } };
  const values = (...args: string[]) => commandLine(args, { version: '0', jobs: {}, groups })!.values;
  assert.equal(values('--no-save-all').saveAll, false);
  assert.equal(values('--no-save-all', '--save-all').saveAll, true);
  assert.ok(!('saveAll' in values()));
  const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'boolean-'));
  try {
    fs.writeFileSync(path.join(dir, 'config.json'), '{"formatVersion":1,"config":{"saveAll":false}}');
    assert.equal(values('--resume', `--out=${dir}`).saveAll, false);
    assert.equal(values('--resume', `--out=${dir}`, '--save-all').saveAll, true);
  } finally {
    fs.rmSync(dir, { recursive: true });
  }
});
