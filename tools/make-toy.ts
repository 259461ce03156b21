/**
 * Makes the bundled target: a tiny language model whose mechanisms are known, because we wrote the language.
 *
 *   npx tsx tools/make-toy.ts [--engine wasm|tensorflow] [--out assets/toy] [--seed 0]
 *
 * A. The grammar      stories of a person and an animal, and the rules that a reader of them must know
 * B. Stories          sampling them, and what nobody can predict better than (the grammar's own entropy)
 * C. The target       a one-layer transformer, trained on fresh stories until it reaches that entropy
 * D. The folder       a Hugging Face model folder, a corpus, and a held-out set with the rules labelled
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import * as tf from '@tensorflow/tfjs';

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
export const VOCABULARY = [
  ...['<unk>', START, '.', '"', 'the', 'a', 'in', 'then', 'was', 'liked', 'said', 'says', 'saw', 'he', 'she'],
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

  // After "the", half the time the story's own animal; else any, of which 60 % in the plural.
  const animals = new Map([...evenly(ANIMALS, 0.2), ...evenly(withS(ANIMALS), 0.3)]);
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
      const then = yield sound ? choose(new Map([['says', 0.6], ['in', 0.4]])) : certain('in'); // biome-ignore format: a table
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

/** Words in a row, the start included. Stories are cut there, most of them in the middle of a sentence. */
export const ROW = 32;

/** A story: its words, and what the grammar knew before each of them. */
export interface Story {
  words: string[];
  positions: Position[];
}

export function sampleStory(random: () => number, length: number): Story {
  const words: string[] = [];
  const positions: Position[] = [];
  const reader = grammar();
  let position = reader.next().value;
  while (words.length < length) {
    let left = random();
    const choices = [...position.choices];
    const [word] = choices.find(([, p]) => (left -= p) < 0) ?? choices.at(-1)!;
    words.push(word);
    positions.push(position);
    position = reader.next(word).value;
  }
  return { words, positions };
}

/** Reads a given text: what the grammar knew before each word and after the last. Throws where it has no such word. */
export function readStory(words: string[]): Position[] {
  const reader = grammar();
  const positions = [reader.next().value];
  for (const word of words) {
    if (!positions.at(-1)!.choices.has(word)) throw new Error(`not in the grammar: ${words.join(' ')} (${word})`);
    positions.push(reader.next(word).value);
  }
  return positions;
}

const IDS = new Map(VOCABULARY.map((word, id) => [word, id]));
const toRow = ({ words }: Story) => [START, ...words].map(word => IDS.get(word)!);

/** Nats per word, on these very stories, that the best possible predictor pays. */
const ownEntropy = (stories: Story[]) => {
  const losses = stories.flatMap(({ words, positions }) => words.map((w, i) => -Math.log(positions[i]!.choices.get(w)!)));
  return losses.reduce((sum, loss) => sum + loss, 0) / losses.length;
};

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

// ---- C. The target ----------------------------------------------------------------------------------------

// Four heads of 12; small enough to be read in one go, large enough to reach the grammar's entropy.
const SIZE = { d: 48, heads: 4, mlp: 192, eps: 1e-6, ropeBase: 10000 };
const STEPS = 2500;
const BATCH = 64;
const LEARNING_RATE = 4e-3;
const WEIGHT_DECAY = 0.05; // on matrices only

/** Weights by their names in the file; matrices are [dOut, dIn]. */
type Weights = Record<string, tf.Variable>;

function initialWeights(random: () => number): Weights {
  const { d, mlp } = SIZE;
  const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  const matrix = (dOut: number, dIn: number, scale = 0.5 / Math.sqrt(dIn)) =>
    tf.variable(tf.tensor2d(Float32Array.from({ length: dOut * dIn }, () => scale * normal()), [dOut, dIn]));
  const ones = () => tf.variable(tf.ones([d]));
  return {
    'wte.weight': matrix(VOCABULARY.length, d, 0.02),
    'h.0.rms_1.weight': ones(),
    'h.0.attn.q_proj.weight': matrix(d, d),
    'h.0.attn.k_proj.weight': matrix(d, d),
    'h.0.attn.v_proj.weight': matrix(d, d),
    'h.0.attn.o_proj.weight': matrix(d, d),
    'h.0.rms_2.weight': ones(),
    'h.0.mlp.c_fc.weight': matrix(mlp, d),
    'h.0.mlp.down_proj.weight': matrix(d, mlp),
    'ln_f.weight': ones(),
  };
}

/** tokens int32 [B, S] -> logits [B·S, vocabulary]. */
function forward(weights: Weights, tokens: tf.Tensor2D): tf.Tensor2D {
  const [B, S] = tokens.shape;
  const { d, heads } = SIZE;
  const w = (name: string) => weights[`${name}.weight`]!;
  const linear = (name: string, x: tf.Tensor) => tf.matMul(x as tf.Tensor2D, w(name) as tf.Tensor2D, false, true);
  const norm = (name: string, x: tf.Tensor) =>
    x.mul(x.square().mean(-1, true).add(SIZE.eps).rsqrt()).mul(w(name)) as tf.Tensor2D;

  const half = d / heads / 2;
  const angles = tf.outerProduct(tf.range(0, S), tf.pow(SIZE.ropeBase, tf.range(0, half).div(-half)) as tf.Tensor1D);
  const [cos, sin] = [angles.cos(), angles.sin()];
  const rotate = (x: tf.Tensor) => {
    const [a, b] = tf.split(x, 2, -1) as [tf.Tensor, tf.Tensor];
    return tf.concat([a.mul(cos).sub(b.mul(sin)), a.mul(sin).add(b.mul(cos))], -1);
  };
  const future = tf.range(0, S).reshape([S, 1]).less(tf.range(0, S)).cast('float32').mul(-1e9); // [S query, S key]

  // An embedding by matMul, because the gradient of gather is missing on WASM.
  const oneHot = tf.oneHot(tokens.flatten() as tf.Tensor1D, VOCABULARY.length) as tf.Tensor2D;
  let x: tf.Tensor2D = tf.matMul(oneHot.cast('float32'), w('wte') as tf.Tensor2D);
  {
    const h = norm('h.0.rms_1', x);
    const [q, k, v] = ['q_proj', 'k_proj', 'v_proj'].map(
      name => linear(`h.0.attn.${name}`, h).reshape([B, S, heads, -1]).transpose([0, 2, 1, 3]), // [B, heads, S, dHead]
    ) as [tf.Tensor, tf.Tensor, tf.Tensor];
    const scores = tf.matMul(rotate(q), rotate(k), false, true).div(Math.sqrt(d / heads)).add(future);
    const mixed = tf.matMul(tf.softmax(scores), v).transpose([0, 2, 1, 3]).reshape([B * S, d]);
    x = x.add(linear('h.0.attn.o_proj', mixed));
  }
  {
    const h = linear('h.0.mlp.c_fc', norm('h.0.rms_2', x));
    const gelu = h.mul(0.5).mul(h.add(h.pow(3).mul(0.044715)).mul(Math.sqrt(2 / Math.PI)).tanh().add(1));
    x = x.add(linear('h.0.mlp.down_proj', gelu));
  }
  return tf.matMul(norm('ln_f', x), w('wte') as tf.Tensor2D, false, true);
}

/** Mean next-token loss in nats; rows hold S + 1 tokens, the last one only to be predicted. */
function nextTokenLoss(weights: Weights, rows: number[][]): tf.Scalar {
  const inputs = tf.tensor2d(rows.map(row => row.slice(0, -1)), undefined, 'int32'); // biome-ignore format: short
  const targets = tf.tensor1d(rows.flatMap(row => row.slice(1)), 'int32');
  const logProbabilities = tf.logSoftmax(forward(weights, inputs));
  const picked = logProbabilities.mul(tf.oneHot(targets, VOCABULARY.length));
  return picked.sum().div(-targets.size) as tf.Scalar;
}

/** AdamW with a warm-up and a cosine, on stories that are never seen twice. */
async function train(seed: number, say: (line: string) => void): Promise<Weights> {
  const random = seeded(seed);
  const weights = initialWeights(random);
  const names = Object.keys(weights);
  const [m, v] = [0, 1].map(() => names.map(name => tf.variable(tf.zerosLike(weights[name]!), false))) as [tf.Variable[], tf.Variable[]];
  const [beta1, beta2] = [0.9, 0.98];

  for (let step = 0; step < STEPS; step++) {
    const rows = Array.from({ length: BATCH }, () => toRow(sampleStory(random, ROW)));
    const cosine = 0.02 + 0.49 * (1 + Math.cos((Math.PI * step) / STEPS));
    const learningRate = LEARNING_RATE * Math.min(1, (step + 1) / 100) * cosine;
    const loss = tf.tidy(() => {
      const { value, grads } = tf.variableGrads(() => nextTokenLoss(weights, rows), Object.values(weights));
      const gradients = names.map(name => grads[weights[name]!.name]!);
      const norm = tf.addN(gradients.map(g => g.square().sum())).sqrt();
      const clip = tf.minimum(1, tf.div(1, norm));
      names.forEach((name, i) => {
        const w = weights[name]!;
        const g = gradients[i]!.mul(clip);
        m[i]!.assign(m[i]!.mul(beta1).add(g.mul(1 - beta1)));
        v[i]!.assign(v[i]!.mul(beta2).add(g.square().mul(1 - beta2)));
        const update = m[i]!.div(1 - beta1 ** (step + 1)).div(v[i]!.div(1 - beta2 ** (step + 1)).sqrt().add(1e-8));
        const decayed = w.rank === 2 ? w.mul(1 - learningRate * WEIGHT_DECAY) : w;
        w.assign(decayed.sub(update.mul(learningRate)));
      });
      return value;
    });
    if (step % 250 === 0 || step === STEPS - 1) say(`step ${step}: loss ${(await loss.data())[0]!.toFixed(4)}`);
    loss.dispose();
  }
  return weights;
}

// ---- D. The folder ----------------------------------------------------------------------------------------

const CONFIG = {
  architectures: ['LlamaSimpleMLP'],
  model_type: 'llama_simple_mlp',
  hidden_size: SIZE.d,
  intermediate_size: SIZE.mlp,
  num_hidden_layers: 1,
  num_attention_heads: SIZE.heads,
  num_key_value_heads: SIZE.heads,
  head_dim: SIZE.d / SIZE.heads,
  vocab_size: VOCABULARY.length,
  max_position_embeddings: ROW,
  rms_norm_eps: SIZE.eps,
  rope_theta: SIZE.ropeBase,
  hidden_act: 'gelu_pytorch_tanh',
  attention_bias: false,
  mlp_bias: false,
  tie_word_embeddings: true,
  bos_token_id: IDS.get(START)!,
  torch_dtype: 'float32',
};

const special = (content: string) => ({
  id: IDS.get(content)!,
  content,
  single_word: false,
  lstrip: false,
  rstrip: false,
  normalized: false,
  special: true,
});

/** Words between spaces are tokens, and a text begins with the start token. */
const TOKENIZER = {
  version: '1.0',
  truncation: null,
  padding: null,
  added_tokens: [special('<unk>'), special(START)],
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
  model: { type: 'WordLevel', vocab: Object.fromEntries(IDS), unk_token: '<unk>' },
};

const TOKENIZER_CONFIG = {
  tokenizer_class: 'PreTrainedTokenizerFast',
  bos_token: START,
  unk_token: '<unk>',
  clean_up_tokenization_spaces: false,
  model_max_length: ROW,
};

const CORPUS_STORIES = 3600;
const EVAL_STORIES = 256;

/** A safetensors file: the header's length, the header, the numbers. */
async function safetensors(weights: Weights): Promise<Buffer> {
  const header: Record<string, unknown> = { __metadata__: { format: 'pt' } };
  const data: Buffer[] = [];
  let offset = 0;
  for (const [name, weight] of Object.entries(weights)) {
    const values = (await weight.data()) as Float32Array;
    header[name] = { dtype: 'F32', shape: weight.shape, data_offsets: [offset, offset + values.byteLength] };
    data.push(Buffer.from(values.buffer, values.byteOffset, values.byteLength));
    offset += values.byteLength;
  }
  const text = Buffer.from(JSON.stringify(header).replace(/$/, ' '.repeat(8)));
  const padded = text.subarray(0, text.length - (text.length % 8)); // the numbers start at a multiple of 8 bytes
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(padded.length));
  return Buffer.concat([length, padded, ...data]);
}

async function main() {
  const { values } = parseArgs({
    options: {
      engine: { type: 'string', default: 'wasm' },
      out: { type: 'string', default: 'assets/toy' },
      seed: { type: 'string', default: '0' },
    },
  });
  const say = (line: string) => process.stderr.write(`${line}\n`);
  if (values.engine === 'tensorflow') await import('@tensorflow/tfjs-node-gpu');
  else await import('@tensorflow/tfjs-backend-wasm');
  await tf.setBackend(values.engine);
  await tf.ready();

  const seed = Number(values.seed);
  const weights = await train(seed, say);

  // Held-out stories first, with one word more than a row holds: their last position has a next word, too.
  const random = seeded(seed + 1);
  const evaluation = Array.from({ length: EVAL_STORIES }, () => sampleStory(random, ROW));
  const heldOut = new Set(evaluation.map(({ words }) => words.slice(0, -1).join(' ')));
  const corpus: string[] = [];
  while (corpus.length < CORPUS_STORIES) {
    const line = sampleStory(random, ROW - 1).words.join(' ');
    if (!heldOut.has(line)) corpus.push(line);
  }
  const loss = (await tf.tidy(() => nextTokenLoss(weights, evaluation.map(toRow))).data())[0]!;
  const entropy = ownEntropy(evaluation);
  const ruleIndex = new Map(RULES.map(({ name }, i) => [name, i]));
  const labels = evaluation.map(({ positions }) => positions.map(({ rules }) => rules.map(rule => ruleIndex.get(rule)!)));

  mkdirSync(values.out, { recursive: true });
  const write = (file: string, content: string | Buffer) => writeFileSync(join(values.out, file), content);
  write('config.json', `${JSON.stringify(CONFIG, null, 2)}\n`);
  write('model.safetensors', await safetensors(weights));
  write('tokenizer.json', `${JSON.stringify(TOKENIZER, null, 1)}\n`);
  write('tokenizer_config.json', `${JSON.stringify(TOKENIZER_CONFIG, null, 2)}\n`);
  write('corpus.txt', `${corpus.join('\n')}\n`);
  write('eval.json', `${JSON.stringify(evaluation.map(story => toRow(story).slice(0, ROW)))}\n`);
  write('labels.json', `${JSON.stringify({ rules: RULES, labels })}\n`);
  console.log(`target loss ${loss.toFixed(4)}, grammar's own entropy ${entropy.toFixed(4)} nats per word`);
  console.log(`excess ${(loss - entropy).toFixed(4)} on ${EVAL_STORIES} held-out stories; wrote ${values.out}`);
  if (loss - entropy > 0.01) throw new Error('the target is more than 0.01 nats above the entropy');
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await main();
