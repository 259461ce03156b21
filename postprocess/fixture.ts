/** For the tests: the two tiny targets of tools/fixtures/method as finished runs; Δ is large in both. */
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import * as tf from '@tensorflow/tfjs';
import { openSafetensors } from '../io/safetensors.ts';
import { type Config, chooseModules, DEFAULTS, type Engine, loadTarget, type Params } from '../nano-param-decomp.ts';
import type { LmRun } from './run.ts';

const FIXTURES = fileURLToPath(new URL('../tools/fixtures/', import.meta.url));
const opByOp: Engine = {
  name: 'cpu',
  gpu: false,
  description: 'op by op',
  compile: (_name, fn) => async feeds => tf.tidy(() => fn(feeds)),
};

/** As openRun gives it; `rows`: its three rows of seven tokens. */
export async function fixtureJob(name: 'llama' | 'simple_mlp', out = ''): Promise<LmRun & { rows: number[][] }> {
  const dir = path.join(FIXTURES, 'method', name);
  const answers = JSON.parse(fs.readFileSync(path.join(dir, 'fixture.json'), 'utf8'));
  const target = await loadTarget(dir);
  const { tensors, readFloat32, close } = await openSafetensors(path.join(dir, 'fixture.safetensors'));
  const params: Params = {};
  for (const [key, { shape }] of tensors)
    if (/^(components|ci_fn)\./.test(key)) params[key] = tf.variable(tf.tensor(readFloat32(key), [...shape]), false);
  close();
  const spec = Object.entries<{ C: number }>(answers.modules).map(([module, { C }]) => `${module}=${C}`);
  const config: Config = { ...DEFAULTS, ...answers.config, components: spec.join(), out };
  const tokens: number[][] = answers.tokens;
  const rows = { count: tokens.length, seqLen: tokens[0]!.length, row: (i: number) => Int32Array.from(tokens[i]!) };
  const data = { train: rows, heldOut: rows, tokenizer: undefined };
  const problem = { target, modules: chooseModules(target.linears, config.components), config };
  return { engine: opByOp, problem, params, data, rows: tokens };
}

/** What PyTorch says about the first row (tools/graph_torch.py): all nodes and edges. */
export function fixtureGraph(name: 'llama' | 'simple_mlp') {
  return JSON.parse(fs.readFileSync(path.join(FIXTURES, 'graphs', `${name}.json`), 'utf8')) as {
    tokens: number[];
    nodes: ({ id: number; position: number } & Record<string, number | string>)[];
    edges: [number, number, number][];
  };
}
