import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { datasetCommit } from './hub.ts';
import { orRefuse, refuse } from './usage-error.ts';

// The record of a run, its config.json.

interface Rows {
  readonly count: number;
  row(i: number): Int32Array | Float32Array;
}
interface Described {
  engine: { name: string; description: string };
  problem: {
    target: { source?: { path: string; type: string; sha256: string; commit?: string | undefined } };
    modules: readonly { path: string; dIn: number; dOut: number; C: number }[];
    config: { data: string };
  };
  data: { train: Rows; heldOut: Rows };
}

/** The SHA-256 of rows; a source without an end has none. */
function hashOf({ count, row }: Rows): string {
  if (count === Number.POSITIVE_INFINITY) return '';
  const sha256 = crypto.createHash('sha256');
  for (let i = 0; i < count; i++) sha256.update(row(i));
  return sha256.digest('hex');
}

/** What config.json holds: the config, and what the run depends on beside it. */
export function runRecord<D extends Described>({ engine, problem, data }: D, version: string) {
  const { target, modules } = problem;
  const config: D['problem']['config'] = problem.config;
  const commit = config.data && datasetCommit(config.data);
  return {
    formatVersion: 1,
    config,
    model: { ...(target.source ?? { path: '', type: 'own network', sha256: '' }) },
    data: {
      path: config.data,
      ...(commit && { commit }),
      sha256: hashOf(data.train),
      trainRows: data.train.count,
      heldOutSha256: hashOf(data.heldOut),
      heldOutRows: data.heldOut.count,
    },
    modules: Object.fromEntries(modules.map(({ path: name, dIn, dOut, C }) => [name, { dIn, dOut, C }])),
    engine: { name: engine.name, description: engine.description },
    versions: { 'nano-param-decomp': version, node: process.versions.node, tfjs: tf.version.tfjs },
    command: process.argv.slice(2),
  };
}

/** The config.json of a run. @throws UsageError if it is none */
export function readRecord(dir: string): Record<string, unknown> {
  const file = path.join(dir, 'config.json');
  const record = orRefuse(file, () => JSON.parse(fs.readFileSync(file, 'utf8')));
  return record?.formatVersion === 1 ? record : refuse(`${file}: not of a run with formatVersion 1`);
}
