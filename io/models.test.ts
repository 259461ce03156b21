// Every architecture against the logits that the transformers library computes (fixtures/models), and every refusal.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { readArchitecture } from '../io/models.ts';
import { openSafetensors } from '../io/safetensors.ts';
import { loadTarget, NAMES, ownLinear, plainArchitecture } from '../nano-param-decomp.ts';

const fixtures = path.join(import.meta.dirname, '../tools/fixtures/models');
const names = fs.readdirSync(fixtures);
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'models-'));
before(() => tf.setBackend('cpu'));
after(() => fs.rmSync(folder, { recursive: true }));

/** Largest difference between the model's logits and the library's. */
async function worstDifference(dir: string, name: string): Promise<number> {
  const file = path.join(fixtures, name, 'logits.safetensors');
  const expected = await openSafetensors(file);
  const want = expected.readFloat32('logits');
  const { begin, end } = expected.tensors.get('tokens')!; // int32
  const ids = new Int32Array(Uint8Array.from(fs.readFileSync(file).subarray(begin, end)).buffer);
  const tokens = tf.tensor2d(ids, [2, 24], 'int32');
  expected.close();
  const target = await loadTarget(dir);
  const logits = await tf.tidy(() => target.forward(tokens, ownLinear(target))).data();
  assert.equal(logits.length, want.length);
  for (const variable of target.weights.values()) variable.dispose();
  return want.reduce((worst, value, i) => Math.max(worst, Math.abs(value - logits[i]!)), 0);
}

for (const name of names)
  test(`${name} computes the logits of the transformers library`, async () => {
    const difference = await worstDifference(path.join(fixtures, name), name);
    assert.ok(difference <= 1e-4, `largest difference ${difference}`);
  });

test("without io/ a plain Llama and the paper's own model are read the same, and others refused", () => {
  let same = 0;
  const toy = path.join(import.meta.dirname, '../assets/toy');
  for (const dir of [toy, ...names.map(name => path.join(fixtures, name))]) {
    const file = path.join(dir, 'config.json');
    if (!fs.existsSync(file)) continue;
    const config = JSON.parse(fs.readFileSync(file, 'utf8'));
    if (/^llama/.test(config.model_type) && !config.rope_scaling && !config.rope_parameters) {
      const { biased: _, activation, ...expected } = readArchitecture(config, file, NAMES);
      const { activation: plain, ...found } = plainArchitecture(config, file);
      assert.deepEqual(found, expected);
      assert.equal(plain.replace('pytorch_tanh', 'new'), activation);
      same++;
    } else assert.throws(() => plainArchitecture(config, file), /needs the folder io\//);
  }
  assert.ok(same >= 3, `${same} compared`);
});

// ---- Refusals -------------------------------------------------------------------------------------------------------

interface Raw {
  dtype: string;
  shape: number[];
  bytes: Buffer;
}
type Config = Record<string, unknown>;
type Tensors = Record<string, Raw>;

function unpack(file: string): Tensors {
  const data = fs.readFileSync(file);
  const start = 8 + Number(data.readBigUInt64LE(0));
  const { __metadata__, ...header } = JSON.parse(data.toString('utf8', 8, start));
  const entries = Object.entries(header as Record<string, { data_offsets: [number, number] } & Raw>);
  return Object.fromEntries(
    entries.map(
      ([
        name,
        {
          dtype,
          shape,
          data_offsets: [from, to],
        },
      ]) => [name, { dtype, shape, bytes: data.subarray(start + from, start + to) }],
    ),
  );
}

function pack(file: string, tensors: Tensors): void {
  let end = 0;
  const header = Object.fromEntries(
    Object.entries(tensors).map(([name, { dtype, shape, bytes }]) => {
      end += bytes.length;
      return [name, { dtype, shape, data_offsets: [end - bytes.length, end] }];
    }),
  );
  const text = Buffer.from(JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(BigInt(text.length));
  fs.writeFileSync(file, Buffer.concat([prefix, text, ...Object.values(tensors).map(t => t.bytes)]));
}

const openFiles = () => (process.platform === 'linux' ? fs.readdirSync('/proc/self/fd').length : 0);

/** Loads the fixture `name` with a changed config or changed tensors, which must fail in one line that says `message`. */
async function refused(name: string, message: RegExp, change: Config | ((tensors: Tensors, dir: string) => void)) {
  const dir = fs.mkdtempSync(path.join(folder, 'm-'));
  fs.cpSync(path.join(fixtures, name), dir, { recursive: true });
  const weights = path.join(dir, 'model.safetensors');
  if (typeof change === 'function') {
    const tensors = fs.existsSync(weights) ? unpack(weights) : {};
    change(tensors, dir);
    if (fs.existsSync(weights)) pack(weights, tensors);
  } else {
    const config = JSON.parse(fs.readFileSync(path.join(dir, 'config.json'), 'utf8'));
    fs.writeFileSync(path.join(dir, 'config.json'), JSON.stringify({ ...config, ...change }));
  }
  const before = openFiles();
  await assert.rejects(
    loadTarget(dir),
    (error: Error) => {
      assert.equal(error.name, 'UsageError', `${name} ${JSON.stringify(change)}: ${error.stack}`);
      assert.match(error.message, message);
      assert.doesNotMatch(error.message, /\n/);
      return true;
    },
    `${name} ${JSON.stringify(change)} should be refused`,
  );
  assert.equal(openFiles(), before, `${name} ${JSON.stringify(change)} left a file open`);
}

test('what a config asks for and is not done is refused by the name of the field', async () => {
  const notDone: [string, Config][] = [
    ['llama', { model_type: 'mixtral' }],
    ['llama', { model_type: 'bloom' }],
    ['llama', { model_type: 'toString' }],
    ['llama', { model_type: undefined }],
    ['llama', { quantization_config: { quant_method: 'gptq', bits: 4 } }],
    ['qwen2', { use_sliding_window: true }],
    ['qwen3', { layer_types: ['full_attention', 'sliding_attention'] }],
    ['gpt_neox', { alibi: true }],
    ['llama', { position_embedding_type: 'alibi' }],
    ['llama', { num_local_experts: 8 }],
    ['llama', { num_experts: 8 }],
    ['llama', { n_routed_experts: 8 }],
    ['llama', { moe_intermediate_size: 64 }],
    ['llama', { attn_logit_softcapping: 50 }],
    ['llama', { final_logit_softcapping: 30 }],
    ['llama', { logit_softcapping: 30 }],
    ['smollm', { rope_interleaved: true }],
    ['smollm', { no_rope_layers: [1, 0] }],
    ['gpt2', { scale_attn_by_inverse_layer_idx: true }],
    ['gpt2', { scale_attn_weights: false }],
    ['gpt2', { add_cross_attention: true }],
    ['llama', { is_encoder_decoder: true }],
    ['llama', { clip_qkv: 8 }],
    ['llama', { logits_scaling: 8 }],
    ['llama', { embedding_multiplier: 12 }],
    ['llama', { residual_multiplier: 0.2 }],
    ['llama', { attention_multiplier: 0.1 }],
    ['llama', { query_pre_attn_scalar: 224 }],
    ['llama', { hidden_act: 'quick_gelu' }],
    ['llama', { hidden_act: 'constructor' }],
    ['gpt2', { activation_function: 'mish' }],
    ['llama', { partial_rotary_factor: 0.5 }],
    ['llama', { num_key_value_heads: 2 }],
    ['llama', { num_attention_heads: 5 }],
    ['llama', { num_attention_heads: 0 }],
    ['llama', { num_hidden_layers: 1.5 }],
    ['llama', { num_hidden_layers: undefined }],
    ['llama', { hidden_size: '24' }],
    ['llama', { vocab_size: -1 }],
    ['llama', { intermediate_size: null }],
    ['llama', { rms_norm_eps: 'small' }],
    ['llama', { head_dim: 0 }],
    ['mistral', { sliding_window: 'none' }],
    ['llama_simple_mlp', { rotary_adjacent_pairs: true }],
    ['llama_simple_mlp', { use_grouped_query_attention: false }],
    ['llama_simple_mlp', { attention_sinks: true }],
  ];
  for (const [name, change] of notDone)
    await refused(name.replace('gpt_neox', 'pythia'), new RegExp(Object.keys(change)[0]!), change);
});

test('rotary embeddings that are not done are refused by name', async () => {
  for (const rope_type of ['dynamic', 'yarn', 'longrope', 'proportional', 'mrope']) {
    await refused('llama', new RegExp(`rope_type.*${rope_type}`), { rope_scaling: { rope_type, factor: 2 } });
    await refused('llama', new RegExp(`type.*${rope_type}`), { rope_scaling: { type: rope_type, factor: 2 } });
    await refused('qwen3', new RegExp(rope_type), { rope_parameters: { rope_theta: 1e4, rope_type, factor: 2 } });
  }
  await refused('llama', /factor/, { rope_scaling: { type: 'linear' } });
  await refused('llama3', /low_freq_factor/, { rope_scaling: { rope_type: 'llama3', factor: 2 } });
  await refused('llama3', /high_freq_factor/, { rope_scaling: { rope_type: 'llama3', factor: 2, low_freq_factor: 1 } });
  await refused('llama', /rope_theta/, { rope_theta: 'large' });
  await refused('llama', /rope_scaling/, { rope_scaling: 'linear' });
  await refused('qwen3', /rope_parameters/, { rope_parameters: { full_attention: { rope_theta: 1e4 } } });
  await refused('pythia', /partial_rotary_factor|rotary_pct/, { rotary_pct: 1.5 });
  await refused('pythia', /partial_rotary_factor|rotary_pct/, { rotary_pct: 0.2 }); // 3 of 16 dims
  await refused('llama', /head_dim/, { head_dim: 7 });
});

test('weights that do not fit the config are refused by the name of the tensor', async () => {
  const q = 'model.layers.1.self_attn.q_proj';
  await refused('llama', /rms_norm|norm\.weight/, t => delete t['model.norm.weight']);
  await refused('llama', new RegExp(`${q}.weight`), t => delete t[`${q}.weight`]);
  await refused('llama', new RegExp(`${q}.weight.*\\[24,23\\].*\\[24,24\\]`), t => {
    const { bytes } = t[`${q}.weight`]!;
    t[`${q}.weight`] = { dtype: 'F16', shape: [24, 23], bytes: bytes.subarray(0, 24 * 23 * 2) };
  });
  await refused('llama', /embed_tokens.*\[61,24\].*\[62,24\]/, { vocab_size: 62 });
  await refused('llama', /no lm_head, and tie_word_embeddings is false/, t => delete t['lm_head.weight']);
  await refused('pythia', /embed_out|lm_head/, t => delete t['embed_out.weight']);
  await refused('gpt2-prefixed', /lm_head/, t => delete t['lm_head.weight']);
  await refused('llama', /no tensor model\.layers\.2\..*there is, for example, model\.layers\./, {
    num_hidden_layers: 3,
  });
  // parts of a layer that is used, beside its weight: without them it would be another function
  for (const part of ['lora_A.weight', 'weight_scale', 'g_idx', 'lora_magnitude_vector'])
    await refused('llama', new RegExp(`${q}.${part} changes what ${q} computes`), t => {
      t[`${q}.${part}`] = t['model.norm.weight']!;
    });
  await refused('llama', /embed_tokens\.lora_embedding_A changes what/, t => {
    t['model.embed_tokens.lora_embedding_A'] = t['model.norm.weight']!;
  });
  await refused('gpt2', /lm_head\.modules_to_save\.default\.weight changes what lm_head/, t => {
    t['lm_head.modules_to_save.default.weight'] = t['wte.weight']!;
  });
  await refused('llama', new RegExp(`${q}.*F8_E4M3`), t => {
    t[`${q}.weight`] = { dtype: 'F8_E4M3', shape: [24, 24], bytes: Buffer.alloc(24 * 24) };
  });
  // a bias that the config promises
  await refused('llama-linear', /q_proj\.bias/, t => delete t[`${q}.bias`]);
  await refused('gpt2', /c_attn\.bias/, t => delete t['h.0.attn.c_attn.bias']);
  await refused('qwen2', /k_proj\.bias/, t => delete t['model.layers.0.self_attn.k_proj.bias']);
  await refused('qwen3', /q_norm/, t => delete t['model.layers.0.self_attn.q_norm.weight']);
});

test('weights that are not finite are refused by the name of the tensor', async () => {
  const up = 'model.layers.1.mlp.up_proj.weight';
  const values: [string, Buffer, string][] = [
    ['F32', Buffer.from(new Float32Array([Number.NaN]).buffer), 'NaN'],
    ['F32', Buffer.from(new Float32Array([-Infinity]).buffer), '-Infinity'],
    ['F16', Buffer.from([0x00, 0x7c]), 'Infinity'],
    ['BF16', Buffer.from([0xc0, 0x7f]), 'NaN'],
    ['F64', Buffer.from(new Float64Array([1e300]).buffer), 'Infinity'], // beyond float32
  ];
  for (const [dtype, value, said] of values)
    await refused('llama', new RegExp(`${up} holds ${said}; these weights can't be used`), t => {
      const bytes = Buffer.alloc(40 * 24 * value.length);
      value.copy(bytes, bytes.length - value.length);
      t[up] = { dtype, shape: [40, 24], bytes };
    });
  await refused('qwen2', /layers\.0\.self_attn\.k_proj\.bias holds NaN/, t => {
    const { dtype, shape, bytes } = t['model.layers.0.self_attn.k_proj.bias']!;
    t['model.layers.0.self_attn.k_proj.bias'] = { dtype, shape, bytes: Buffer.alloc(bytes.length, 0xff) };
  });
});

/** A copy of the fixture `name` with changed tensors and config. */
function changed(name: string, change: (tensors: Tensors, config: Config) => unknown): string {
  const dir = fs.mkdtempSync(path.join(folder, 'm-'));
  fs.cpSync(path.join(fixtures, name), dir, { recursive: true });
  const [weights, json] = [path.join(dir, 'model.safetensors'), path.join(dir, 'config.json')];
  const [tensors, config] = [unpack(weights), JSON.parse(fs.readFileSync(json, 'utf8'))];
  pack(weights, (change(tensors, config) as Tensors | undefined) ?? tensors);
  fs.writeFileSync(json, JSON.stringify(config));
  return dir;
}
const renamed = (tensors: Tensors, rename: (name: string) => string): Tensors =>
  Object.fromEntries(Object.entries(tensors).map(([name, tensor]) => [rename(name), tensor]));

/** The logits must be the fixture's; returns what was said on the way. */
async function sameLogits(dir: string, name: string): Promise<string[]> {
  const said: string[] = [];
  const write = process.stderr.write;
  process.stderr.write = (line: string | Uint8Array) => said.push(String(line)) > 0;
  try {
    const difference = await worstDifference(dir, name);
    assert.ok(difference <= 1e-4, `${name}: largest difference ${difference}`);
  } finally {
    process.stderr.write = write;
  }
  return said;
}

test('wrappers, a prefix or a missing base prefix in stored names: the same network', async () => {
  const base: Record<string, string> = { llama: 'model.', qwen2: 'model.', qwen3: 'model.', pythia: 'gpt_neox.' };
  const forms: Record<string, (name: string) => string> = {
    'a base model': name => name.replace(/^(model|gpt_neox|transformer)\./, ''),
    'torch.compile': name => `_orig_mod.${name}`,
    'torch.compile of each block': name => name.replace(/\.(\d+)\./, '.$1._orig_mod.'),
    DataParallel: name => `module.${name}`,
    both: name => `module._orig_mod.${name}`,
    FSDP: name =>
      `_fsdp_wrapped_module.${name.replace(/\.(\d+)\./, '.$1._fsdp_wrapped_module._checkpoint_wrapped_module.')}`,
    'a compiled base model': name => `_orig_mod.${name.replace(/^(model|gpt_neox)\./, '')}`,
    'a merged adapter': name => `base_model.model.${name}`,
    'a trainer': name => `model.${name}`,
  };
  for (const name of [...Object.keys(base), 'gpt2', 'gpt2-prefixed', 'llama_simple_mlp'])
    for (const [form, rename] of Object.entries(forms)) {
      const said = await sameLogits(
        changed(name, tensors => renamed(tensors, rename)),
        name,
      );
      assert.deepEqual(said, [], `${name}, ${form}`);
    }
  // a copy beside the model: the exact names are the model's, the others are said to be unused
  const [line, ...more] = await sameLogits(
    changed('llama', t => ({ ...renamed(t, n => `ema.${n}`), ...t })),
    'llama',
  );
  assert.match(line!, /^warning {2}.*ema\.model\.embed_tokens\.weight.*not used\n$/);
  assert.deepEqual(more, []);
});

test('names that could be two things, or none, are refused by a name that is there', async () => {
  const replace = (t: Tensors, other: Tensors) => {
    for (const name of Object.keys(t)) delete t[name];
    Object.assign(t, other);
  };
  await refused('llama', /which of student\.model\.embed_tokens\.weight, teacher\.model\.embed_tokens\.weight is/, t =>
    replace(t, { ...renamed(t, n => `student.${n}`), ...renamed(t, n => `teacher.${n}`) }),
  );
  await refused('llama', /lm_head\.weight and module\.lm_head\.weight are two tensors of one name/, t => {
    t['module.lm_head.weight'] = t['lm_head.weight']!;
  });
  await refused('llama', /no tensor model\.embed_tokens\.weight; there is, for example, tok_embeddings\.weight/, t =>
    replace(t, { 'tok_embeddings.weight': t['model.embed_tokens.weight']! }),
  );
  await refused('llama', /no tensor model\.layers\.0\.self_attn\.q_proj\.weight; .*layers\.0\.self_attn\./, t =>
    replace(
      t,
      renamed(t, n => n.replace('q_proj', 'query')),
    ),
  );
});

test('what config.json does not imply is not used, as in the transformers library, and said in one line', async () => {
  const bias = (n: number): Raw => ({
    dtype: 'F32',
    shape: [n],
    bytes: Buffer.from(new Float32Array(n).fill(0.3).buffer),
  });
  const cases: [string, Tensors, RegExp][] = [
    [
      'llama',
      { 'model.layers.0.self_attn.o_proj.bias': bias(24), 'model.layers.1.self_attn.o_proj.bias': bias(24) },
      /^warning {2}\S+: config\.json implies no model\.layers\.0\.self_attn\.o_proj\.bias and 1 like it: not used\n$/,
    ],
    ['llama', { 'model.layers.0.mlp.up_proj.bias': bias(40) }, /mlp\.up_proj\.bias: not used/],
    ['llama', { 'model.norm.bias': bias(24) }, /model\.norm\.bias: not used/],
    ['qwen2', { 'model.layers.0.self_attn.o_proj.bias': bias(24) }, /o_proj\.bias: not used/],
    ['qwen3', { 'model.layers.0.self_attn.q_proj.bias': bias(24) }, /q_proj\.bias: not used/],
    ['llama', { 'lm_head.bias': bias(61) }, /lm_head\.bias: not used/],
    [
      'llama',
      { 'v_head.summary.weight': bias(24), 'score.weight': bias(24) },
      /v_head\.summary\.weight, score\.weight: not/,
    ],
    ['llama', { 'model.layers.2.mlp.up_proj.weight': bias(1) }, /model\.layers\.2\.mlp\.up_proj\.weight: not used/],
  ];
  for (const [name, more, message] of cases) {
    const said = await sameLogits(
      changed(name, t => ({ ...t, ...more })),
      name,
    );
    assert.equal(said.length, 1, `${said}`);
    assert.match(said[0]!, message);
  }
  // buffers are no news
  const buffers = ['rotary_emb.inv_freq', 'rotary_emb.cos_cached', 'k_scale', 'v_scale'];
  const withBuffers = (t: Tensors) => {
    for (const buffer of buffers) t[`model.layers.0.self_attn.${buffer}`] = bias(1);
  };
  assert.deepEqual(await sameLogits(changed('llama', withBuffers), 'llama'), []);
  // fields that the library does not read in these families
  for (const [name, fields] of [
    ['qwen2', { attention_bias: false, mlp_bias: true }],
    ['qwen3', { mlp_bias: true }],
  ] as const) {
    const dir = changed(name, (_, config) => void Object.assign(config, fields));
    assert.deepEqual(await sameLogits(dir, name), []);
  }
});

test('what a clone or a download left instead of a file of the model is named', async () => {
  const pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n';
  for (const file of ['config.json', 'tokenizer.json', 'model.safetensors.index.json', 'model.safetensors'])
    for (const [content, message] of [
      [pointer, 'is a Git LFS pointer, not the file: run "git lfs pull"'],
      ['<!DOCTYPE html><html>', 'is an HTML page, not the file: download'],
    ] as const) {
      const dir = changed('llama', () => {});
      if (file.endsWith('index.json')) fs.rmSync(path.join(dir, 'model.safetensors'));
      fs.writeFileSync(path.join(dir, file), content);
      const before = openFiles();
      await assert.rejects(loadTarget(dir), { name: 'UsageError', message: new RegExp(`${file}: ${message}`) });
      assert.equal(openFiles(), before);
    }
  const adapter = fs.mkdtempSync(path.join(folder, 'm-'));
  fs.cpSync(path.join(fixtures, 'llama/config.json'), path.join(adapter, 'config.json'));
  for (const file of ['adapter_config.json', 'adapter_model.safetensors'])
    fs.writeFileSync(path.join(adapter, file), '');
  await assert.rejects(loadTarget(adapter), { name: 'UsageError', message: /holds an adapter.*merge it/ });
  const file = path.join(fixtures, 'llama/model.safetensors');
  await assert.rejects(loadTarget(file), { name: 'UsageError', message: /model\.safetensors: no such folder/ });
});

test('folders that are no checkpoint are refused by the name of the file', async () => {
  const edit = (file: string, content: string) => (_: Tensors, dir: string) =>
    fs.writeFileSync(path.join(dir, file), content);
  const remove = (file: string) => (_: Tensors, dir: string) => fs.rmSync(path.join(dir, file));
  await refused('llama', /config\.json/, remove('config.json'));
  await refused('llama', /config\.json/, edit('config.json', '{"model_type": "llama", '));
  await refused('llama', /config\.json/, edit('config.json', '[]'));
  await refused('llama', /no model\.safetensors/, remove('model.safetensors'));
  await refused('llama_simple_mlp-original', /model_step_7.*model_step_8/, (_, dir) =>
    fs.copyFileSync(path.join(dir, 'model_step_7.safetensors'), path.join(dir, 'model_step_8.safetensors')),
  );
  const index = 'model.safetensors.index.json';
  await refused('mistral', /model-00002-of-00003\.safetensors/, remove('model-00002-of-00003.safetensors'));
  await refused('mistral', /index\.json/, edit(index, '{}'));
  await refused('mistral', /index\.json/, edit(index, '{"weight_map": {"a": "../../secret.safetensors"}}'));
  await refused('mistral', /index\.json/, edit(index, '{"weight_map": {"a": 1}}'));
  await refused('mistral', /index\.json/, edit(index, 'null'));
});
