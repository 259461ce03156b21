// Checkpoints of llama2.c: their logits and token ids after the conversion, against llama2.c's own arithmetic
// (make_llama2c_fixtures.py), and every refusal.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { openSafetensors } from '../io/safetensors.ts';
import { loadTokenizer } from '../io/tokenizer.ts';
import { loadTarget, ownLinear } from '../nano-param-decomp.ts';
import { convert, halvesFromPairs, main } from './llama2c.ts';

const fixtures = path.join(import.meta.dirname, 'fixtures/llama2c');
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'llama2c-'));
before(() => tf.setBackend('cpu'));
after(() => fs.rmSync(folder, { recursive: true }));
const fixture = (...parts: string[]) => path.join(fixtures, ...parts);
const readJson = (...parts: string[]) => JSON.parse(fs.readFileSync(path.join(...parts), 'utf8'));

async function worstDifference(dir: string, name: string): Promise<number> {
  const file = fixture(name, 'logits.safetensors');
  const expected = await openSafetensors(file);
  const want = expected.readFloat32('logits');
  const { begin, end } = expected.tensors.get('tokens')!; // int32
  const ids = new Int32Array(Uint8Array.from(fs.readFileSync(file).subarray(begin, end)).buffer);
  expected.close();
  const target = await loadTarget(dir);
  const tokens = tf.tensor2d(ids, [2, 24], 'int32');
  const logits = await tf.tidy(() => target.forward(tokens, ownLinear(target))).data();
  for (const variable of target.weights.values()) variable.dispose();
  assert.equal(logits.length, want.length);
  return want.reduce((worst, value, i) => Math.max(worst, Math.abs(value - logits[i]!)), 0);
}

for (const name of ['tied', 'untied'])
  for (const [checkpoint, tokenizer] of [
    ['model.pt', 'tokenizer.model'],
    ['legacy.bin', 'tokenizer.bin'],
    ['version1.bin', 'tokenizer.bin'],
  ] as const)
    test(`${name} ${checkpoint} with ${tokenizer} gives llama2.c's logits and token ids`, async () => {
      const out = path.join(folder, `${name}-${checkpoint}`);
      await convert(fixture(name, checkpoint), fixture(name, tokenizer), out);
      const difference = await worstDifference(out, name);
      assert.ok(difference <= 1e-4, `largest difference ${difference}`);
      assert.equal(readJson(out, 'config.json').tie_word_embeddings, name === 'tied');
      const tokenizerOf = loadTokenizer(out);
      const encodings: { text: string; ids: number[] }[] = readJson(fixture(name, 'encodings.json'));
      assert.ok(encodings.length >= 4);
      for (const { text, ids } of encodings) {
        assert.deepEqual(tokenizerOf.encode(text).ids, ids, text);
        assert.equal(tokenizerOf.decode(ids.slice(1)), text);
      }
      const left = fs.readdirSync(folder).filter(file => file.includes('.tmp-'));
      assert.deepEqual(left, [], 'nothing unfinished is left');
    });

test('the three files of one model give the same folder, whichever tokenizer file was taken', () => {
  for (const name of ['tied', 'untied'])
    for (const file of ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']) {
      const [pt, ...bins] = ['model.pt', 'legacy.bin', 'version1.bin'].map(checkpoint =>
        fs.readFileSync(path.join(folder, `${name}-${checkpoint}`, file)),
      );
      for (const bin of bins) assert.ok(bin.equals(pt!), `${name} ${file}`);
    }
});

test("the logits show it when the rows of q and k keep llama2.c's order, and when heads are mixed up", async () => {
  const rows = Float32Array.from({ length: 8 }, (_, i) => i);
  assert.deepEqual([...halvesFromPairs(rows, 2, 4)], [0, 2, 1, 3, 4, 6, 5, 7]);
  const out = path.join(folder, 'tied-legacy.bin');
  const wrong = path.join(folder, 'wrong');
  fs.cpSync(out, wrong, { recursive: true });
  const file = path.join(wrong, 'model.safetensors');
  const { tensors, close } = await openSafetensors(file);
  close();
  const { begin, end } = tensors.get('model.layers.0.self_attn.q_proj.weight')!;
  const bytes = fs.readFileSync(file);
  const q = new Float32Array(Uint8Array.from(bytes.subarray(begin, end)).buffer);
  Buffer.from(halvesFromPairs(q, 2, 8).buffer).copy(bytes, begin);
  fs.writeFileSync(file, bytes);
  assert.ok((await worstDifference(wrong, 'tied')) > 0.05);
});

test('what is no such checkpoint or tokenizer is refused by name, and leaves nothing behind', async () => {
  const made = (name: string, bytes: Uint8Array) => {
    fs.writeFileSync(path.join(folder, name), bytes);
    return path.join(folder, name);
  };
  const legacy = fs.readFileSync(fixture('tied/legacy.bin'));
  const version1 = fs.readFileSync(fixture('tied/version1.bin'));
  const pt = fs.readFileSync(fixture('tied/model.pt'));
  const tokens = fs.readFileSync(fixture('tied/tokenizer.bin'));
  const pieces = fs.readFileSync(fixture('tied/tokenizer.model'));
  const changed = (bytes: Buffer, at: number, value: number) => {
    const copy = Buffer.from(bytes);
    copy.writeInt32LE(value, at);
    return copy;
  };
  const modelType = pieces.lastIndexOf(Buffer.from([0x18, 2, 0x20]));
  const unigram = Buffer.from(pieces);
  unigram[modelType + 1] = 1;
  const [good, words] = [fixture('tied/legacy.bin'), fixture('tied/tokenizer.bin')];
  const refusals: [checkpoint: string, tokenizer: string, says: RegExp][] = [
    [path.join(folder, 'none.bin'), words, /none\.bin: ENOENT/],
    [made('short.bin', legacy.subarray(0, 100)), words, /short\.bin: ends too early/],
    [made('cut.bin', legacy.subarray(0, -4)), words, /cut\.bin: (ends too early|has \d+ bytes, its header asks for)/],
    [made('longer.bin', Buffer.concat([legacy, Buffer.alloc(4)])), words, /longer\.bin: has \d+ bytes/],
    [made('int8.bin', changed(version1, 4, 2)), words, /int8\.bin: is of version 2 \(int8\)/],
    [made('random.bin', Buffer.alloc(400, 0xee)), words, /random\.bin: dim is -\d+: not a llama2\.c checkpoint/],
    [made('heads.bin', changed(legacy, 12, 3)), words, /heads\.bin: a width of 16 is nothing for 3 heads/],
    [made('text.pt', Buffer.from('no zip')), words, /text\.pt: is no zip archive/],
    [made('cut.pt', pt.subarray(0, -30)), words, /cut\.pt: /],
    [fixture('tied/legacy.bin'), made('cut-tokenizer.bin', tokens.subarray(0, -1)), /ends too early, at token \d+/],
    [fixture('tied/legacy.bin'), made('more.bin', Buffer.concat([tokens, tokens])), /has more than the checkpoint's/],
    [good, made('unigram.model', unigram), /unigram\.model: is no sentencepiece model of type BPE/],
    [good, made('noise.model', Buffer.alloc(64, 0xff)), /noise\.model: /],
  ];
  for (const [checkpoint, tokenizer, says] of refusals) {
    const out = path.join(folder, 'refused');
    const refused = (error: Error) => error.name === 'UsageError' && says.test(error.message);
    await assert.rejects(convert(checkpoint, tokenizer, out), refused, `${checkpoint} ${tokenizer}`);
    assert.ok(!fs.existsSync(out));
  }
  await assert.rejects(convert(good, words, folder), /is there already/);
  await assert.rejects(main(['--checkpoint', good]), /takes npx tsx/);
  await assert.rejects(main(['--chekpoint', good]), /chekpoint/);
});

test('a pickle is data: an opcode or a call that torch.save does not write does nothing', async () => {
  const bytes = fs.readFileSync(fixture('tied/model.pt'));
  const at = bytes.indexOf('ccollections\nOrderedDict\n');
  assert.ok(at > 0);
  // of the same length: the name of a function that must never be looked up
  Buffer.from('cprocess\nexit_immediately\n').copy(bytes, at, 0, 'ccollections\nOrderedDict\n'.length);
  const file = path.join(folder, 'hostile.pt');
  fs.writeFileSync(file, bytes);
  const out = path.join(folder, 'hostile');
  await assert.rejects(convert(file, fixture('tied/tokenizer.bin'), out), /hostile\.pt: /);
});
