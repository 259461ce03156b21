// The tokenizers of a dozen families against the Python library, on text meant to break them (fixtures/tokenizers).

import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { loadTokenizer } from '../io/tokenizer.ts';
import { UsageError } from '../io/usage-error.ts';

/** What make_tokenizer_fixtures.py wrote for a text: `full` (with special tokens) is left out where it equals `ids`. */
interface Expected {
  ids: number[];
  full?: number[];
  text: string;
  raw: string;
  threes: string[];
}

const root = path.join(import.meta.dirname, '../tools/fixtures/tokenizers');
const read = (...names: string[]) => JSON.parse(fs.readFileSync(path.join(root, ...names), 'utf8'));
const hostile: string[] = read('hostile.json');
const families = fs.readdirSync(root).filter(name => !name.endsWith('.json'));
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'tokenizers-'));
after(() => fs.rmSync(folder, { recursive: true }));

for (const family of families)
  test(`${family} encodes and decodes as the Python library does`, () => {
    const tokenizer = loadTokenizer(path.join(root, family));
    const decode = (ids: number[], skip_special_tokens = false) =>
      ids.length > 0 ? tokenizer.decode(ids, { skip_special_tokens }) : '';
    const expected: Expected[] = read(family, 'expected.json');
    for (const [i, text] of [...hostile, hostile.join('\n')].entries()) {
      const want = expected[i]!;
      const full = want.full ?? want.ids;
      const shown = `${family}, text ${i}: ${JSON.stringify(text.slice(0, 60))}`;
      assert.deepEqual(tokenizer.encode(text, { add_special_tokens: false }).ids, want.ids, shown);
      assert.deepEqual(tokenizer.encode(text).ids, full, shown);
      assert.equal(decode(full, true), want.text, shown);
      assert.equal(decode(full), want.raw, shown);
      const threes = want.threes.map((_, j) => decode(want.ids.slice(3 * j, 3 * j + 3)));
      assert.deepEqual(threes, want.threes, shown);
    }
  });

test('what the library would get wrong or does not know is refused by name', () => {
  const bert = read('bert', 'tokenizer.json');
  const gpt2 = read('gpt2', 'tokenizer.json');
  const unigram = read('unigram', 'tokenizer.json');
  const precompiled = { type: 'Precompiled', precompiled_charsmap: '' };
  const cases: [RegExp, object][] = [
    [/normalizer "Precompiled" is not done here/, { ...unigram, normalizer: precompiled }],
    [/"Precompiled"/, { ...unigram, normalizer: { type: 'Sequence', normalizers: [precompiled] } }],
    [/Unigram "byte_fallback"/, { ...unigram, model: { ...unigram.model, byte_fallback: true } }],
    [/"continuing_subword_prefix"/, { ...gpt2, model: { ...gpt2.model, continuing_subword_prefix: '##' } }],
    [/"single_word"/, { ...bert, added_tokens: [{ ...bert.added_tokens[0], single_word: true }] }],
    [/Unknown PreTokenizer type: UnicodeScripts/, { ...bert, pre_tokenizer: { type: 'UnicodeScripts' } }],
    [/Unknown Normalizer type: Nmt/, { ...bert, normalizer: { type: 'Nmt' } }],
  ];
  for (const [message, json] of cases) {
    fs.writeFileSync(path.join(folder, 'tokenizer.json'), JSON.stringify(json));
    assert.throws(
      () => loadTokenizer(folder),
      (error: Error) => error instanceof UsageError && message.test(error.message) && !error.message.includes('\n'),
    );
  }
  for (const content of [
    '',
    '{',
    'null',
    '[]',
    '"a"',
    '{}',
    '{"model":null}',
    '{"model":{}}',
    '{"model":{"type":"BPE"}}',
  ]) {
    fs.writeFileSync(path.join(folder, 'tokenizer.json'), content);
    assert.throws(() => loadTokenizer(folder), { name: 'UsageError' }, content);
  }
  const broken = { ...bert, pre_tokenizer: { type: 'Split' } };
  fs.writeFileSync(path.join(folder, 'tokenizer.json'), JSON.stringify(broken));
  assert.throws(() => loadTokenizer(folder), { name: 'UsageError' });
});
