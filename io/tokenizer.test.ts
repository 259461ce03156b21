// The tokenizers of a dozen families against the Python library, on text meant to break them (fixtures/tokenizers).

import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
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
/** The tokenizer of a family with parts exchanged. */
function loadChanged(json: object) {
  fs.writeFileSync(path.join(folder, 'tokenizer.json'), JSON.stringify(json));
  return loadTokenizer(folder);
}
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

/** Parts that stand in place of a family's, and eight digits of a hash of the ids of each hostile text. */
interface Variant {
  base: string;
  model?: object;
  added_tokens?: object[];
  digests: string;
}

test('variants of the families: other splitters, normalizers and added tokens', () => {
  const variants: Variant[] = read('variants.json');
  assert.ok(variants.length > 80);
  const differ: string[] = [];
  for (const { base, model, added_tokens = [], digests, ...parts } of variants) {
    const json = read(base, 'tokenizer.json');
    const top =
      1 +
      Math.max(...(Object.values(json.model.vocab) as number[]), ...json.added_tokens.map((t: { id: number }) => t.id));
    const added = added_tokens.map((token, i) => ({ ...token, id: top + i }));
    const tokenizer = loadChanged({
      ...json,
      ...parts,
      model: { ...json.model, ...model },
      added_tokens: [...json.added_tokens, ...added],
    });
    const digest = (text: string) =>
      createHash('sha256')
        .update(JSON.stringify(tokenizer.encode(text).ids))
        .digest('hex')
        .slice(0, 8);
    const wrong = hostile.filter((text, i) => digest(text) !== digests.slice(8 * i, 8 * i + 8));
    if (wrong.length > 0)
      differ.push(`${base} ${JSON.stringify({ ...parts, model, added_tokens })}: ${JSON.stringify(wrong[0])}`);
  }
  assert.deepEqual(differ, []);
});

test('half a surrogate pair is U+FFFD, as in UTF-8', () => {
  for (const family of families) {
    const { encode } = bound(family);
    assert.deepEqual(encode('a\ud83d b \ude00'), encode('a\ufffd b \ufffd'), family);
  }
});

const bound = (family: string) => {
  const tokenizer = loadTokenizer(path.join(root, family));
  return { encode: (text: string): number[] => tokenizer.encode(text, { add_special_tokens: false }).ids };
};

// No time is measured: what took the square of its length would not end (300 kB took minutes), what overflowed throws.
test('long documents without a space', () => {
  for (const family of ['gemma', 'llama2', 'merged', 'gpt2']) {
    const { encode } = bound(family);
    const one = encode('ab'.repeat(8)).length;
    assert.ok(encode('ab'.repeat(150_000)).length > 10_000 * one, family);
  }
  // JavaScript's expressions can't go back over so many characters: in one piece, or beside a word
  const splitters = [
    { type: 'Metaspace', replacement: '▁', prepend_scheme: 'always' },
    { type: 'Split', pattern: { Regex: ' ?\\p{L}+| ?\\p{N}+|\\s+' }, behavior: 'Isolated', invert: false },
  ];
  for (const [i, pre_tokenizer] of splitters.entries()) {
    const words = loadChanged({ ...read('word-level-split', 'tokenizer.json'), pre_tokenizer });
    const { ids } = words.encode(`${'漢'.repeat(9_000_000)}${['▁', ' '][i]}of`);
    assert.deepEqual(ids, [words.token_to_id('<unk>'), words.token_to_id('<unk>')]);
  }
  assert.equal(bound('unigram').encode('catz'.repeat(50_000)).length, 150_000);
  assert.equal(bound('bert').encode('a'.repeat(1_000_000)).length, 1); // unknown as a whole
  assert.equal(bound('bert').encode('a '.repeat(200_000)).length, 200_000);
});

test('what the library would get wrong or does not know is refused by name', () => {
  const bert = read('bert', 'tokenizer.json');
  const gpt2 = read('gpt2', 'tokenizer.json');
  const unigram = read('unigram', 'tokenizer.json');
  const digits = { type: 'Split', pattern: { Regex: '[0-9]' } };
  const precompiled = { type: 'Precompiled', precompiled_charsmap: '' };
  const cases: [RegExp, object][] = [
    [/normalizer "Precompiled" is not done here/, { ...unigram, normalizer: precompiled }],
    [/"Precompiled"/, { ...unigram, normalizer: { type: 'Sequence', normalizers: [precompiled] } }],
    [/"continuing_subword_prefix"/, { ...gpt2, model: { ...gpt2.model, continuing_subword_prefix: '##' } }],
    [/Unknown behavior of a Split: Kept/, { ...bert, pre_tokenizer: { ...digits, behavior: 'Kept' } }],
    [/merge 0 \(a bc\) is not in the vocabulary/, { ...gpt2, model: { ...gpt2.model, merges: ['a bc'] } }],
    [/Unknown model type: Other/, { ...gpt2, model: { ...gpt2.model, type: 'Other' } }],
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
