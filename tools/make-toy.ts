/**
 * Makes the bundled target: a tiny language model whose mechanisms are known, because we wrote the language.
 *
 *   npx tsx tools/make-toy.ts [--engine auto|tensorflow|wasm] [--out assets/toy] [--seed 0]
 *
 * A. The grammar      stories of a person and an animal, and the rules that a reader of them must know
 * B. Stories          sampling them, and what nobody can predict better than (the grammar's own entropy)
 * C. The target       a one-layer transformer, trained on fresh stories until it reaches that entropy
 * D. The folder       a Hugging Face model folder, a corpus, and a held-out set with the rules labelled
 *
 * The same code, engine and number of cores give the same bytes again; where one of them differs, the weights do a
 * little, the other files not. The committed files were made by TensorFlow 2.21 on two cores.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import * as tf from '@tensorflow/tfjs';
import { readArchitecture } from '../io/models.ts';
import { writeSafetensors } from '../io/safetensors.ts';
import {
  adam,
  cosine,
  crossEntropy,
  DEFAULTS,
  type Engine,
  NAMES as FAMILIES,
  languageModel,
  linearLayers,
  loadTarget,
  ownLinear,
  startEngine,
  type Target,
} from '../nano-param-decomp.ts';

// ---- A. The grammar ---------------------------------------------------------------------------------------
//
//   tom saw a cow .                   who and which animal the story is about
//   then he was sad .                 "he", because of tom
//   he liked the red apple .          red things are apples (70 %) or roses (30 %)
//   the cow says " moo " .            the story's animal comes back, and every animal has its own sound
//   the dogs in the barn run .        "run", not "runs", because of dogs three words before
//   tom said " hello " .              only the story's person speaks
//
// The first sentence is always of the first kind; then sentences of the other five kinds follow at random.

const MEN = ['tom', 'ben', 'sam', 'max'];
const WOMEN = ['mia', 'lily', 'anna', 'zoe'];
const SOUNDS = new Map([
  ['cow', 'moo'],
  ['dog', 'woof'],
  ['cat', 'meow'],
  ['duck', 'quack'],
  ['pig', 'oink'],
  ['lamb', 'baa'],
  ['horse', 'neigh'],
  ['lion', 'roar'],
]);
/** What is likely, and what is less likely, to have a colour. */
const THINGS = new Map([
  ['red', ['apple', 'rose']],
  ['yellow', ['banana', 'sun']],
  ['green', ['leaf', 'grass']],
  ['blue', ['sky', 'sea']],
  ['white', ['snow', 'milk']],
  ['brown', ['bread', 'mud']],
] as const);
const PLACES = ['barn', 'park', 'house', 'wood'];
const VERBS = ['run', 'jump', 'sleep', 'play', 'swim', 'eat'];
const MOODS = ['happy', 'sad', 'tired', 'hungry'];
const EXCLAMATIONS = ['hello', 'yes', 'no', 'wow'];

const NAMES = [...MEN, ...WOMEN];
const ANIMALS = [...SOUNDS.keys()];
const COLOURS = [...THINGS.keys()];
const withS = (words: string[]) => words.map(word => `${word}s`);

export const START = '<s>';
const UNKNOWN = '<unk>';
export const VOCABULARY = [
  ...[UNKNOWN, START, '.', '"', 'the', 'a', 'in', 'then', 'was', 'liked', 'said', 'says', 'saw', 'he', 'she'],
  ...[...NAMES, ...ANIMALS, ...withS(ANIMALS), ...SOUNDS.values(), ...COLOURS, ...[...THINGS.values()].flat()],
  ...[...PLACES, ...VERBS, ...withS(VERBS), ...MOODS, ...EXCLAMATIONS],
];

/** The rules: facts that a predictor must know at a position. They say what is known there, not what comes. */
export const RULES = [
  ...NAMES.map(name => [`name:${name}`, `a sentence starts, and if with a name then with ${name}`]),
  ...['he', 'she'].map(who => [`gender:${who}`, `a sentence starts, and if with a pronoun then with "${who}"`]),
  ...['he', 'she'].map(who => [`then-gender:${who}`, `after "then" comes "${who}"`]),
  ...COLOURS.map(colour => [`colour:${colour}`, `the next word is a thing that is ${colour}`]),
  ...ANIMALS.map(animal => [`focus:${animal}`, `after "the" at a sentence start: the story is about the ${animal}`]),
  ...ANIMALS.map(animal => [`sound:${animal}`, `the ${animal} says, and the quote is open`]),
  ['agree:singular', 'a verb for one animal, named three words before'],
  ['agree:plural', 'a verb for several animals, named three words before'],
  ['the:animal', '"the" at a sentence start: an animal follows'],
  ['the:colour', '"the" after "liked": a colour follows'],
  ['the:place', '"the" after "in": a place follows'],
  ['quote:sound', 'a quote has opened after "says": a sound follows'],
  ['quote:word', 'a quote has opened after "said": an exclamation follows'],
  ['quote:close', 'the one word of a quote is over: the quote closes'],
  ['quote:after', 'the quote is closed: the sentence ends'],
].map(([name, description]) => ({ name: name!, description: description! }));

/** What the grammar knows before a word: the probability of every possible word, and the rules in force. */
export interface Position {
  choices: Map<string, number>;
  rules: string[];
}

const choose = (choices: Map<string, number>, ...rules: string[]): Position => ({ choices, rules });
const evenly = (words: string[], total = 1) => new Map(words.map(word => [word, total / words.length]));
const certain = (word: string, ...rules: string[]): Position => ({ choices: new Map([[word, 1]]), rules });

/**
 * The grammar as a coroutine: it yields what it knows, is sent the word that came, and goes on from there, for
 * ever. So it samples stories, scores them and labels them; and what it yields depends on the words alone.
 */
export function* grammar(): Generator<Position, never, string> {
  const name = yield choose(evenly(NAMES));
  const pronoun = MEN.includes(name) ? 'he' : 'she';
  yield certain('saw');
  yield certain('a');
  const animal = yield choose(evenly(ANIMALS));
  yield certain('.');

  // After "the", half the time the story's own animal; else any, one or several.
  const animals = new Map([...evenly(ANIMALS, 0.25), ...evenly(withS(ANIMALS), 0.25)]);
  animals.set(animal, animals.get(animal)! + 0.5);
  const starts = new Map([
    ['then', 0.2],
    [pronoun, 0.2],
    ['the', 0.4],
    [name, 0.2],
  ]);

  while (true) {
    const start = yield choose(starts, `name:${name}`, `gender:${pronoun}`);
    if (start === 'then') {
      yield certain(pronoun, `then-gender:${pronoun}`);
      yield certain('was');
      yield choose(evenly(MOODS));
    } else if (start === pronoun) {
      yield certain('liked');
      yield certain('the');
      const colour = yield choose(evenly(COLOURS), 'the:colour');
      const [likely, other] = THINGS.get(colour as 'red')!;
      yield choose(new Map([[likely, 0.7], [other, 0.3]]), `colour:${colour}`); // biome-ignore format: a table
    } else if (start === 'the') {
      const who = yield choose(animals, 'the:animal', `focus:${animal}`);
      const sound = SOUNDS.get(who);
      const then = yield sound ? choose(new Map([['says', 0.7], ['in', 0.3]])) : certain('in'); // biome-ignore format: a table
      if (then === 'says') {
        yield certain('"');
        yield certain(sound!, 'quote:sound', `sound:${who}`);
        yield certain('"', 'quote:close');
        yield certain('.', 'quote:after');
        continue;
      }
      yield certain('the');
      yield choose(evenly(PLACES), 'the:place');
      yield sound ? choose(evenly(withS(VERBS)), 'agree:singular') : choose(evenly(VERBS), 'agree:plural');
    } else {
      yield certain('said');
      yield certain('"');
      yield choose(evenly(EXCLAMATIONS), 'quote:word');
      yield certain('"', 'quote:close');
      yield certain('.', 'quote:after');
      continue;
    }
    yield certain('.');
  }
}

// ---- B. Stories -------------------------------------------------------------------------------------------

/** Tokens in a row: the start and 31 words. Stories are cut there, most of them in the middle of a sentence. */
export const ROW = 32;

/** Numbers in [0, 1) from an integer seed (the generator known as mulberry32). */
export function seeded(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let z = Math.imul(state ^ (state >>> 15), 1 | state);
    z = (z + Math.imul(z ^ (z >>> 7), 61 | z)) ^ z;
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** One of the choices, each with its probability. */
function pick(choices: Map<string, number>, random: () => number): string {
  let left = random();
  let picked = '';
  for (const [word, probability] of choices) {
    picked = word;
    left -= probability;
    if (left < 0) break;
  }
  return picked;
}

export function sampleStory(random: () => number, length = ROW - 1): string[] {
  const teller = grammar();
  let { choices } = teller.next().value;
  return Array.from({ length }, () => {
    const word = pick(choices, random);
    choices = teller.next(word).value.choices;
    return word;
  });
}

/** What the grammar knows before each word of a text, and after the last. @throws at a word that can't come there */
export function readStory(words: string[]): Position[] {
  const reader = grammar();
  const positions = [reader.next().value];
  for (const word of words) {
    if (!positions.at(-1)!.choices.has(word)) throw new Error(`"${word}" can't come here: ${words.join(' ')}`);
    positions.push(reader.next(word).value);
  }
  return positions;
}

/** Nats per word on these very stories under the grammar itself: no predictor does better, but by luck. */
export function ownEntropy(stories: string[][]): number {
  const losses = stories.flatMap(words => {
    const positions = readStory(words);
    return words.map((word, i) => -Math.log(positions[i]!.choices.get(word)!));
  });
  return losses.reduce((a, b) => a + b, 0) / losses.length;
}

const IDS = new Map(VOCABULARY.map((word, id) => [word, id]));
const toRow = (words: string[]) => [START, ...words].map(word => IDS.get(word)!);

// ---- C. The target ----------------------------------------------------------------------------------------

const CONFIG = {
  architectures: ['LlamaSimpleMLP'],
  model_type: 'llama_simple_mlp',
  hidden_size: 48,
  intermediate_size: 192,
  num_hidden_layers: 1,
  num_attention_heads: 4,
  num_key_value_heads: 4,
  head_dim: 12,
  vocab_size: VOCABULARY.length,
  max_position_embeddings: ROW,
  rms_norm_eps: 1e-6,
  rope_theta: 10000,
  hidden_act: 'gelu_pytorch_tanh',
  attention_bias: false,
  mlp_bias: false,
  tie_word_embeddings: true,
  bos_token_id: IDS.get(START)!,
  torch_dtype: 'float32',
};

const STEPS = 2500;
const BATCH = 64;
const WARMUP_STEPS = 100;
const LEARNING_RATE = 4e-3;
const BETAS = { beta1: 0.9, beta2: 0.98, eps: 1e-8 };
/** Of matrices only. More of it makes parts that are cut out missed more, but the rules share them more. */
const WEIGHT_DECAY = 0.2;

/** The network before training. Its weights are trainable here; the product's are frozen. */
function newTarget(random: () => number) {
  const arch = readArchitecture(CONFIG, 'config.json', FAMILIES);
  const linears = linearLayers(arch);
  const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  const matrix = (rows: number, columns: number, scale: number) =>
    tf.variable(
      tf.tensor2d(
        Float32Array.from({ length: rows * columns }, () => scale * normal()),
        [rows, columns],
      ),
    );
  const weights = new Map<string, tf.Variable>([['wte.weight', matrix(arch.vocab, arch.dModel, 0.02)]]);
  for (const { path, dIn, dOut } of linears) weights.set(path, matrix(dIn, dOut, 0.5 / Math.sqrt(dIn)));
  for (const norm of ['h.0.rms_1', 'h.0.rms_2', 'ln_f'])
    weights.set(`${norm}.weight`, tf.variable(tf.ones([arch.dModel])));
  return languageModel({ arch, linears, weights });
}

/** Mean loss in nats over all words but the first of each row. */
export const nextWordLoss = (target: Target, rows: tf.Tensor2D) =>
  crossEntropy(tf.logSoftmax(target.forward(rows, ownLinear(target))), rows) as tf.Scalar;

/** AdamW with a warm-up and a cosine, on stories that are hardly ever seen twice. */
async function train(engine: Engine, random: () => number): Promise<Target> {
  const target = newTarget(random);
  const weights = [...target.weights.values()];
  const state = weights.map(w => ({
    w,
    m: tf.variable(tf.zerosLike(w), false),
    v: tf.variable(tf.zerosLike(w), false),
  }));
  const step = engine.compile(
    'train the target',
    ({ rows, lr, c1, c2 }: Record<'rows' | 'lr' | 'c1' | 'c2', tf.Tensor>) => {
      const { value, grads } = tf.valueAndGrads(() => nextWordLoss(target, rows as tf.Tensor2D))(weights);
      const norm = tf.sqrt(tf.addN(grads.map(grad => tf.sum(tf.square(grad)))));
      const clip = tf.minimum(1, tf.div(1, norm));
      for (const [i, { w, m, v }] of state.entries()) {
        const move = adam(tf.mul(grads[i]!, clip), m, v, BETAS, c1, c2);
        const decay = tf.mul(w, w.rank === 2 ? WEIGHT_DECAY : 0);
        w.assign(tf.sub(w, tf.mul(lr, tf.add(move.direction, decay))));
        m.assign(move.m);
        v.assign(move.v);
      }
      return { loss: value };
    },
  );
  for (let i = 0; i < STEPS; i++) {
    // one word more than a row holds, so that the last position of a row, too, learns what comes next
    const stories = Array.from({ length: BATCH }, () => toRow(sampleStory(random, ROW)));
    const feeds = {
      rows: tf.tensor2d(stories, [BATCH, ROW + 1], 'int32'),
      lr: tf.scalar(LEARNING_RATE * Math.min(1, (i + 1) / WARMUP_STEPS) * cosine(i, STEPS, 0.02)),
      c1: tf.scalar(1 - BETAS.beta1 ** (i + 1)),
      c2: tf.scalar(1 - BETAS.beta2 ** (i + 1)),
    };
    const { loss } = await step(feeds);
    if (i % 250 === 0 || i === STEPS - 1) console.error(`step ${i}: loss ${(await loss.data())[0]!.toFixed(4)}`);
    tf.dispose([feeds, loss]);
  }
  return target;
}

// ---- D. The folder ----------------------------------------------------------------------------------------

const special = (content: string) => ({
  id: IDS.get(content)!,
  content,
  single_word: false,
  lstrip: false,
  rstrip: false,
  normalized: false,
  special: true,
});

/** What stands between spaces is a token, and a text begins with the start token. */
const TOKENIZER = {
  version: '1.0',
  truncation: null,
  padding: null,
  added_tokens: [special(UNKNOWN), special(START)],
  normalizer: null,
  pre_tokenizer: { type: 'WhitespaceSplit' },
  post_processor: {
    type: 'TemplateProcessing',
    single: [{ SpecialToken: { id: START, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
    pair: [
      { SpecialToken: { id: START, type_id: 0 } },
      { Sequence: { id: 'A', type_id: 0 } },
      { Sequence: { id: 'B', type_id: 1 } },
    ],
    special_tokens: { [START]: { id: START, ids: [IDS.get(START)!], tokens: [START] } },
  },
  decoder: null,
  model: { type: 'WordLevel', vocab: Object.fromEntries(IDS), unk_token: UNKNOWN },
};

const TOKENIZER_CONFIG = {
  tokenizer_class: 'PreTrainedTokenizerFast',
  bos_token: START,
  unk_token: UNKNOWN,
  clean_up_tokenization_spaces: false,
  model_max_length: ROW,
};

const CORPUS_STORIES = 3600;
const EVAL_STORIES = 256;

async function main() {
  const { values } = parseArgs({
    options: {
      engine: { type: 'string', default: 'auto' },
      out: { type: 'string', default: 'assets/toy' },
      seed: { type: 'string', default: '0' },
    },
  });
  const engine = await startEngine({ ...DEFAULTS, engine: values.engine });
  console.error(engine.description);

  const seed = Number(values.seed);
  const target = await train(engine, seeded(seed));

  const random = seeded(seed + 1);
  const evaluation = Array.from({ length: EVAL_STORIES }, () => sampleStory(random));
  const heldOut = new Set(evaluation.map(words => words.join(' ')));
  const corpus: string[] = [];
  while (corpus.length < CORPUS_STORIES) {
    const line = sampleStory(random).join(' ');
    if (!heldOut.has(line)) corpus.push(line);
  }
  const ruleIds = new Map(RULES.map(({ name }, i) => [name, i]));
  const labels = evaluation.map(words => readStory(words).map(({ rules }) => rules.map(rule => ruleIds.get(rule)!)));

  mkdirSync(values.out, { recursive: true });
  const write = (file: string, content: string) => writeFileSync(join(values.out, file), `${content}\n`);
  const rows = evaluation.map(toRow);
  write('config.json', JSON.stringify(CONFIG, null, 2));
  write('tokenizer.json', JSON.stringify(TOKENIZER, null, 1));
  write('tokenizer_config.json', JSON.stringify(TOKENIZER_CONFIG, null, 2));
  write('corpus.txt', corpus.join('\n'));
  write('eval.json', JSON.stringify(rows));
  write('labels.json', JSON.stringify({ rules: RULES, labels }));
  // the file has the names and the layout of PyTorch: a linear layer's matrix is [dOut, dIn]
  const tensors = [...target.weights].map(([name, weight]) => {
    const isLinear = target.linears.some(({ path }) => path === name);
    const stored = isLinear ? tf.transpose(weight) : weight;
    return { name: isLinear ? `${name}.weight` : name, shape: stored.shape, data: stored.dataSync() as Float32Array };
  });
  await writeSafetensors(join(values.out, 'model.safetensors'), tensors, { format: 'pt' });

  // as everyone will see it: from the files
  const loss = (await nextWordLoss(await loadTarget(values.out), tf.tensor2d(rows, undefined, 'int32')).data())[0]!;
  const entropy = ownEntropy(evaluation);
  console.log(
    `target ${loss.toFixed(4)}, the grammar's own entropy ${entropy.toFixed(4)} nats per word, on the held-out stories`,
  );
  if (loss - entropy > 0.01) throw new Error('the target is more than 0.01 nats above the entropy: train it longer');
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await main();
