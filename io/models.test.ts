// Every architecture against the logits that the transformers library computes (fixtures/models), and every refusal.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import * as tf from '@tensorflow/tfjs';
import { readArchitecture } from '../io/models.ts';
import { openSafetensors } from '../io/safetensors.ts';
import { loadTarget, NAMES, plainArchitecture, targetForward } from '../nano-param-decomp.ts';

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
  const logits = await tf.tidy(() => targetForward(target, tokens)).data();
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
      const { biased: __, activation: plain, ...found } = plainArchitecture(config, file);
      assert.deepEqual(found, expected);
      assert.equal(plain.replace('pytorch_tanh', 'new'), activation);
      same++;
    } else assert.throws(() => plainArchitecture(config, file), /needs io\/models\.ts/);
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
  await refused('llama', /lm_head/, t => delete t['lm_head.weight']);
  await refused('pythia', /embed_out|lm_head/, t => delete t['embed_out.weight']);
  await refused('gpt2-prefixed', /lm_head/, t => delete t['lm_head.weight']);
  // one layer fewer than the file has, an adapter, a classification head: tensors nobody asked for
  await refused('llama', /model\.layers\.1\./, { num_hidden_layers: 1 });
  await refused('llama', /model\.layers\.2\./, { num_hidden_layers: 3 });
  await refused('llama', /q_proj\.lora_A/, t => {
    t[`${q}.lora_A.weight`] = t['model.norm.weight']!;
  });
  await refused('llama', /score\.weight/, t => {
    t['score.weight'] = t['model.norm.weight']!;
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
