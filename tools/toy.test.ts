/** The toy's grammar, and that the committed files in assets/toy are what it makes. */
import assert from 'node:assert/strict';
import { readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { Tokenizer } from '@huggingface/tokenizers';
import * as tf from '@tensorflow/tfjs';
import { DEFAULTS, loadTarget, startEngine } from '../nano-param-decomp.ts';
import { nextWordLoss, ownEntropy, ROW, RULES, readStory, sampleStory, seeded, VOCABULARY } from './make-toy.ts';

const toy = fileURLToPath(new URL('../assets/toy/', import.meta.url));
const text = (file: string) => readFileSync(join(toy, file), 'utf8');
const corpus = text('corpus.txt').trimEnd().split('\n');
const rows: number[][] = JSON.parse(text('eval.json'));
const { rules, labels } = JSON.parse(text('labels.json')) as { rules: typeof RULES; labels: number[][][] };
const evaluation = rows.map(row => row.slice(1).map(id => VOCABULARY[id]!));
const tokenizer = new Tokenizer(JSON.parse(text('tokenizer.json')), JSON.parse(text('tokenizer_config.json')));

const sum = (numbers: Iterable<number>) => [...numbers].reduce((a, b) => a + b, 0);
const near = (a: number, b: number, tolerance: number, what: string) =>
  assert.ok(Math.abs(a - b) <= tolerance, `${what}: ${a}, expected ${b} ± ${tolerance}`);

test('at every position the choices are words of the vocabulary, with probabilities that add up to 1', () => {
  assert.equal(new Set(VOCABULARY).size, VOCABULARY.length);
  const random = seeded(1);
  for (let i = 0; i < 200; i++) {
    for (const { choices } of readStory(sampleStory(random, 40))) {
      near(sum(choices.values()), 1, 1e-12, 'sum');
      for (const word of choices.keys()) assert.ok(VOCABULARY.includes(word), word);
    }
  }
});

test('the probabilities of all beginnings of a story add up to 1', () => {
  const beginnings = (words: string[], length: number): number => {
    if (length === 0) return 1;
    const { choices } = readStory(words).at(-1)!;
    return sum([...choices].map(([word, p]) => p * beginnings([...words, word], length - 1)));
  };
  near(beginnings([], 8), 1, 1e-12, 'sum');
});

test('stories are sampled with the probabilities that the grammar claims', () => {
  const [n, random] = [20_000, seeded(2)];
  const counts = new Map<string, number>();
  const expected = new Map<string, number>();
  for (let i = 0; i < n; i++) {
    const words = sampleStory(random, 12);
    const last = readStory(words.slice(0, -1)).at(-1)!.choices;
    for (const [word, p] of last) expected.set(word, (expected.get(word) ?? 0) + p);
    counts.set(words.at(-1)!, (counts.get(words.at(-1)!) ?? 0) + 1);
  }
  // the twelfth word: its count against the sum of the probabilities, five standard deviations wide
  for (const [word, count] of expected) near(counts.get(word) ?? 0, count, 5 * Math.sqrt(count) + 1, word);
});

test('a label is a state: after the same words the same rules, whatever comes next', () => {
  const random = seeded(3);
  let longest = 0;
  for (let i = 0; i < 300; i++) {
    const [a, b] = [sampleStory(random), sampleStory(random)];
    const same = a.findIndex((word, j) => word !== b[j]);
    longest = Math.max(longest, same);
    assert.deepEqual(readStory(a).slice(0, same + 1), readStory(b).slice(0, same + 1));
  }
  assert.ok(longest >= 8, `no two stories had more than ${longest} words in common`);
});

test('the rules of a position', () => {
  const at = (story: string) => readStory(story.split(' ')).at(-1)!.rules;
  assert.deepEqual(at('tom saw a'), []);
  assert.deepEqual(at('tom saw a cow .'), ['name:tom', 'gender:he']);
  assert.deepEqual(at('mia saw a cow . then'), ['then-gender:she']);
  assert.deepEqual(at('mia saw a cow . the'), ['the:animal', 'focus:cow']);
  assert.deepEqual(at('mia saw a cow . the pig says "'), ['quote:sound', 'sound:pig']);
  assert.deepEqual(at('mia saw a cow . the pig says " oink'), ['quote:close']);
  assert.deepEqual(at('mia saw a cow . the pigs in the'), ['the:place']);
  assert.deepEqual(at('mia saw a cow . the pigs in the barn'), ['agree:plural']);
  assert.deepEqual(at('mia saw a cow . the pig in the barn'), ['agree:singular']);
  assert.deepEqual(at('mia saw a cow . she liked the'), ['the:colour']);
  assert.deepEqual(at('mia saw a cow . she liked the red'), ['colour:red']);
  assert.deepEqual(at('mia saw a cow . mia said "'), ['quote:word']);
  assert.throws(() => at('mia saw a cow . tom'), /"tom" can't come here/);
});

test('the entropy is the mean of -log p', () => {
  near(ownEntropy([['tom', 'saw', 'a', 'cow']]), (2 * Math.log(8)) / 4, 1e-12, 'four words');
});

test('the labels are those of the evaluation rows, and every rule is in force at least 20 times', () => {
  assert.deepEqual(rules, RULES);
  assert.equal(RULES.length, 43);
  assert.equal(labels.length, rows.length);
  for (const [i, words] of evaluation.entries()) {
    assert.equal(rows[i]!.length, ROW);
    assert.equal(VOCABULARY[rows[i]![0]!], '<s>');
    const known = readStory(words).map(position => position.rules); // throws where a row is no story
    assert.deepEqual(
      labels[i]!.map(indices => indices.map(index => rules[index]!.name)),
      known,
    );
  }
  for (const [index, { name }] of rules.entries()) {
    const support = sum(labels.flat().map(indices => Number(indices.includes(index))));
    assert.ok(support >= 20, `${name}: ${support}`);
  }
});

test('the corpus is stories, none of which is in the evaluation set', () => {
  const heldOut = new Set(evaluation.map(words => words.join(' ')));
  assert.equal(new Set(corpus).size, corpus.length);
  for (const line of corpus) {
    assert.equal(readStory(line.split(' ')).length, ROW);
    assert.ok(!heldOut.has(line), line);
  }
});

test('the tokenizer gives the rows, and back', () => {
  for (const [i, words] of evaluation.entries()) {
    const story = words.join(' ');
    assert.deepEqual(tokenizer.encode(story).ids, rows[i]);
    assert.equal(tokenizer.decode(rows[i]!, { skip_special_tokens: true }), story);
  }
  assert.equal(VOCABULARY[tokenizer.encode('elephant').ids[1]!], '<unk>');
});

test('the target reaches the entropy of the grammar', async () => {
  await startEngine({ ...DEFAULTS, engine: 'wasm' });
  const target = await loadTarget(toy);
  const loss = tf.tidy(() => nextWordLoss(target, tf.tensor2d(rows, [rows.length, ROW], 'int32')));
  const excess = (await loss.data())[0]! - ownEntropy(evaluation);
  assert.ok(excess < 0.01, `${excess} nats above`);
});

test('everything is smaller than 1 MB', () => {
  assert.ok(sum(readdirSync(toy).map(file => statSync(join(toy, file)).size)) < 1e6);
});
