/** A run of the original's, read by import_run.py, gives what PyTorch computed: tools/make_original_fixture.py. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import * as tf from '@tensorflow/tfjs';
import { importances, inputBatch, maskedForward, openRun, ownLinear } from '../nano-param-decomp.ts';

const fixture = (file: string) => fileURLToPath(new URL(`fixtures/original/${file}`, import.meta.url));

test('an imported checkpoint: importances, the target and the masked logits are PyTorch’s to 1e-5', async () => {
  const places = { model: fixture('target'), data: fixture('rows.json'), evalData: fixture('rows.json') };
  const { problem, params, data } = await openRun(fixture(''), { ...places, engine: 'wasm' });
  const expected = JSON.parse(readFileSync(fixture('expected.json'), 'utf8')) as Record<string, number[]>;
  const tokens = inputBatch(data.heldOut, [0, 1]);
  const { g } = importances(problem, params, tokens);
  const found = {
    g,
    logits: problem.target.forward(tokens, ownLinear(problem.target)),
    maskedLogits: maskedForward(problem, params, tokens, { mask: g }),
  };
  for (const [name, tensor] of Object.entries<tf.Tensor>(found)) {
    const values = await tensor.data();
    const wanted = expected[name]!;
    assert.equal(values.length, wanted.length, name);
    const largest = Math.max(...wanted.map(Math.abs));
    const error = Math.max(...wanted.map((x, i) => Math.abs(x - values[i]!)));
    assert.ok(largest > 0.9, `${name}: ${largest}`);
    assert.ok(error <= 1e-5 * Math.max(1, largest), `${name} is ${error} off, of at most ${largest}`);
  }
  const apart = tf.max(tf.abs(tf.sub(found.logits, found.maskedLogits)));
  assert.ok((await apart.data())[0]! > 0.1, 'the masks change something');
});
