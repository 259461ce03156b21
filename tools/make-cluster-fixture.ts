/**
 * Makes tools/fixtures/cluster/toy.json: where each component of a decomposed toy fires on its held-out rows, so that
 * the test of the clustering needs no training.
 *
 *   npm start -- --out RUN && npx tsx tools/make-cluster-fixture.ts RUN
 */
import { writeFileSync } from 'node:fs';
import * as tf from '@tensorflow/tfjs';
import { importances, inputBatch, openRun } from '../nano-param-decomp.ts';

const FIRES_ABOVE = 0.1;

const { problem, params, data } = await openRun(process.argv[2] ?? '');
const rows = Array.from({ length: data.heldOut.count }, (_, i) => i);
const g = tf.tidy(() => importances(problem, params, inputBatch(data.heldOut, rows)).g);
const values = await g.data();
const [N = 0, columns = 0] = g.shape;
const leaves: [string, number][] = [];
const sets: string[] = [];
for (const { path, offset, C } of problem.modules) {
  for (let index = 0; index < C; index++) {
    const set = Buffer.alloc(Math.ceil(N / 8));
    for (let n = 0; n < N; n++) if (values[n * columns + offset + index]! > FIRES_ABOVE) set[n >> 3]! |= 1 << (n & 7);
    if (set.every(byte => byte === 0)) continue;
    leaves.push([path, index]);
    sets.push(set.toString('base64').replace(/A{4,}/g, zeros => `~${zeros.length}~`)); // most bytes are 0
  }
}
const file = new URL('fixtures/cluster/toy.json', import.meta.url);
writeFileSync(file, `${JSON.stringify({ positions: N, firesAbove: FIRES_ABOVE, leaves, sets })}\n`);
