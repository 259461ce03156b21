import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as path from 'node:path';
import { openShards } from './safetensors.ts';
import { readObject } from './stand-in.ts';
import { orRefuse, refuse } from './usage-error.ts';

// What the families of models call things, and everything a config may ask for: done, or refused by name. Nothing here
// is assumed to be harmless because it is rare; a field that changes the network and is overlooked gives wrong numbers.

type Config = Readonly<Record<string, unknown>>;

/** State-dict names without `.weight`, those of a block within it. What a family lacks is left out. */
// biome-ignore format: in the network's order
interface Names {
  embed: string; positions?: string; blocks: string; last: string; head: string;
  norm1: string; q: string; k?: string; v?: string; qNorm?: string; kNorm?: string; o: string;
  norm2: string; gate?: string; up: string; down: string;
}
type Activation = 'silu' | 'relu' | 'gelu' | 'gelu_new';

/** The families that the file itself knows. */
type OwnNames = Readonly<Record<'llama' | 'llama_simple_mlp', Names>>;

/** All families, given those of the file itself. */
// biome-ignore format: in the network's order
const familiesBeside = (own: OwnNames): Record<string, Names> => ({
  ...own,
  gpt2: {
    embed: 'wte', positions: 'wpe', blocks: 'h', last: 'ln_f', head: 'lm_head',
    norm1: 'ln_1', q: 'attn.c_attn', o: 'attn.c_proj',
    norm2: 'ln_2', up: 'mlp.c_fc', down: 'mlp.c_proj',
  },
  gpt_neox: {
    embed: 'gpt_neox.embed_in', blocks: 'gpt_neox.layers', last: 'gpt_neox.final_layer_norm', head: 'embed_out',
    norm1: 'input_layernorm', q: 'attention.query_key_value', o: 'attention.dense',
    norm2: 'post_attention_layernorm', up: 'mlp.dense_h_to_4h', down: 'mlp.dense_4h_to_h',
  },
  mistral: own.llama,
  qwen2: own.llama,
  qwen3: { ...own.llama, qNorm: 'self_attn.q_norm', kNorm: 'self_attn.k_norm' },
});

/** The functions under all names that configs give them. */
const ACTIVATIONS: Record<string, Activation> = {
  silu: 'silu',
  swish: 'silu',
  relu: 'relu',
  gelu: 'gelu',
  gelu_python: 'gelu',
  gelu_new: 'gelu_new',
  gelu_pytorch_tanh: 'gelu_new',
  gelu_python_tanh: 'gelu_new',
  gelu_fast: 'gelu_new',
  gelu_accurate: 'gelu_new',
};

/** Fields of a config that ask for something not done here, unless their value is one of these (or absent or null). */
const NOT_DONE: [meaning: string, fields: string, harmless: unknown[]][] = [
  ['quantised weights', 'quantization_config', []],
  ['sliding-window attention', 'use_sliding_window', [false]],
  ['ALiBi or other positions', 'alibi position_embedding_type', [false, 'rope', 'absolute']],
  ['a mixture of experts', 'num_local_experts num_experts n_routed_experts moe_intermediate_size', [0]],
  ['soft-capped logits', 'attn_logit_softcapping final_logit_softcapping logit_softcapping', []],
  ['another rotary embedding', 'rope_interleaved rotary_adjacent_pairs', [false]],
  ['attention other than grouped queries', 'use_grouped_query_attention', [true]],
  ['attention sinks', 'attention_sinks', [false]],
  ['cross-attention or an encoder', 'add_cross_attention is_encoder_decoder', [false]],
  ['another attention scale', 'scale_attn_by_inverse_layer_idx attention_multiplier query_pre_attn_scalar', [false]],
  ['unscaled attention', 'scale_attn_weights', [true]],
  ['clipped q, k, v', 'clip_qkv', []],
  ['scaled streams', 'logits_scaling embedding_multiplier residual_multiplier', [1]],
];

/**
 * Reads a Hugging Face config.json.
 * @param own the names of the families that the file itself knows
 * @throws UsageError naming the field that is wrong or not done here
 */
export function readArchitecture(config: Config, file: string, own: OwnNames) {
  const families = familiesBeside(own);
  const wrong = (field: string, takes: string) =>
    refuse(`${file}: ${field} is ${JSON.stringify(config[field]) ?? 'missing'}; ${takes}`);
  const type = String(config.model_type);
  if (!Object.hasOwn(families, type)) wrong('model_type', `done here are ${Object.keys(families).join(', ')}`);
  for (const [meaning, fields, harmless] of NOT_DONE) {
    for (const field of fields.split(' ')) {
      if (![undefined, null, ...harmless].includes(config[field] as null)) wrong(field, `${meaning}: not done here`);
    }
  }
  for (const [field, done] of [
    ['layer_types', 'full_attention'],
    ['no_rope_layers', 1],
  ] as const) {
    if (![config[field] ?? []].flat().every(layer => layer === done)) wrong(field, `not done here other than ${done}`);
  }
  const number = (field: string, standard?: number, min = 0, max = 1): number => {
    const value = config[field] ?? standard;
    return typeof value === 'number' && value >= min && value <= max ? value : wrong(field, `takes ${min} to ${max}`);
  };
  const count = (field: string, standard?: number, max = 1 << 24): number => {
    const value = number(field, standard, 1, max);
    return Number.isInteger(value) ? value : wrong(field, 'takes an integer');
  };
  const [gpt2, neox, simple] = [type === 'gpt2', type === 'gpt_neox', type === 'llama_simple_mlp'];
  const dModel = count(gpt2 ? 'n_embd' : 'hidden_size', undefined, 1 << 17);
  const headField = gpt2 ? 'n_head' : 'num_attention_heads';
  const nHeads = count(headField, undefined, 4096);
  const nKvHeads = count('num_key_value_heads', nHeads, 4096);
  if (nHeads % nKvHeads !== 0) wrong('num_key_value_heads', `takes a divisor of the ${nHeads} heads`);
  const headDim = count('head_dim', type === 'qwen3' ? 128 : Math.floor(dModel / nHeads), 4096);
  if (!config.head_dim && type !== 'qwen3' && dModel % nHeads !== 0) wrong(headField, `takes a divisor of ${dModel}`);
  const activationField = gpt2 ? 'activation_function' : 'hidden_act';
  const activation = String(config[activationField] ?? (gpt2 || simple ? 'gelu_new' : neox ? 'gelu' : 'silu'));
  if (!Object.hasOwn(ACTIVATIONS, activation))
    wrong(activationField, `done here: ${Object.keys(ACTIVATIONS).join(', ')}`);
  const positionsField = gpt2 ? 'n_positions' : 'max_position_embeddings';
  const positions = count(positionsField, gpt2 ? 1024 : 2048);
  // absent means 4096 in mistral, null means none
  const window = type === 'mistral' && config.sliding_window !== null ? count('sliding_window', 4096) : Infinity;
  return {
    type,
    names: families[type]!,
    dModel,
    nHeads,
    headDim,
    activation: ACTIVATIONS[activation]!,
    nKvHeads: gpt2 || neox ? nHeads : nKvHeads,
    vocab: count('vocab_size'),
    dMlp: count(gpt2 ? 'n_inner' : 'intermediate_size', gpt2 ? 4 * dModel : undefined),
    nLayers: count(gpt2 ? 'n_layer' : 'num_hidden_layers', undefined, 4096),
    context: Math.min(positions, window),
    contextField: window < positions ? 'sliding_window' : positionsField,
    norm: gpt2 || neox ? ('layer' as const) : ('rms' as const),
    eps: number(gpt2 ? 'layer_norm_epsilon' : neox ? 'layer_norm_eps' : 'rms_norm_eps', gpt2 || neox ? 1e-5 : 1e-6),
    rotary: gpt2 ? undefined : rotaryFrequencies(config, headDim, positions, file),
    qkv: gpt2 ? ('concatenated' as const) : neox ? ('by head' as const) : ('separate' as const),
    conv1d: gpt2,
    parallelResidual: neox && config.use_parallel_residual !== false,
    biased: biasedLayers(config, type),
    tied: Boolean(config.tie_word_embeddings ?? (gpt2 || simple)),
  };
}

/**
 * gpt2 has biases everywhere, gpt_neox in its MLPs, qwen2 on q, k, v and mistral nowhere, whatever their configs say; of
 * the others attention_bias and mlp_bias tell, as far as the transformers library reads these.
 */
function biasedLayers({ attention_bias, mlp_bias }: Config, type: string): RegExp {
  if (type === 'gpt2') return /./;
  if (type === 'qwen2') return /[qkv]_proj$/;
  if (type === 'mistral') return /^$/;
  const neox = type === 'gpt_neox';
  const attention = (attention_bias ?? neox) ? '[qkvo]_proj$|\\.attention\\.' : '^$';
  return new RegExp(`${attention}|${neox || (mlp_bias && type !== 'qwen3') ? '\\.mlp\\.' : '^$'}`);
}

/** Inverse wavelengths θ^(−2i/dims), with the `linear` and `llama3` scalings; under the old and the new config keys. */
function rotaryFrequencies(config: Config, headDim: number, positions: number, file: string) {
  const neox = config.model_type === 'gpt_neox';
  for (const field of ['rope_scaling', 'rope_parameters']) {
    const values = Object.values(config[field] ?? {});
    if (typeof (config[field] ?? {}) !== 'object' || values.some(v => v && typeof v === 'object'))
      refuse(`${file}: ${field} is ${JSON.stringify(config[field])}; takes one record for all layers`);
  }
  const rope: Record<string, unknown> = {
    rope_theta: config.rope_theta ?? config.rotary_emb_base ?? 10_000,
    partial_rotary_factor: config.rotary_pct ?? config.partial_rotary_factor ?? (neox ? 0.25 : 1),
    ...(config.rope_scaling as object | null | undefined),
    ...(config.rope_parameters as object | null | undefined),
  };
  const wrong = (field: string, takes: string) =>
    refuse(`${file}: the rotary ${field} is ${JSON.stringify(rope[field]) ?? 'missing'}; ${takes}`);
  const number = (field: string, min: number): number => {
    const value = rope[field];
    return typeof value === 'number' && value >= min && value < 1e12 ? value : wrong(field, `takes at least ${min}`);
  };
  const kind = rope.rope_type ?? rope.type ?? 'default';
  const kindField = rope.rope_type === undefined ? 'type' : 'rope_type';
  if (!['default', 'linear', 'llama3'].includes(String(kind))) wrong(kindField, 'done here: default, linear, llama3');
  const share = number('partial_rotary_factor', 0);
  if (share > 1 || (!neox && share !== 1)) wrong('partial_rotary_factor', 'partial is done in gpt_neox only');
  const dims = Math.floor(headDim * share);
  if (dims % 2 !== 0) wrong('partial_rotary_factor', `of head_dim ${headDim} it leaves ${dims} dims, an odd number`);
  const theta = number('rope_theta', 1);
  return Float32Array.from({ length: dims / 2 }, (_, i) => {
    const frequency = theta ** ((-2 * i) / dims);
    if (kind === 'default') return frequency;
    const factor = number('factor', 1);
    if (kind === 'linear') return frequency / factor;
    // llama3: long wavelengths are divided by the factor, short ones kept, a linear blend in between
    const [low, high] = [number('low_freq_factor', 0), number('high_freq_factor', 0)];
    rope.original_max_position_embeddings ??= positions;
    const turns = (number('original_max_position_embeddings', 1) * frequency) / (2 * Math.PI);
    const keep = Math.min(1, Math.max(0, (turns - low) / (high - low)));
    return frequency * (keep + (1 - keep) / factor);
  });
}

// biome-ignore format: what belongs together on one line
const YAML_KEYS: Record<string, string> = {
  n_embd: 'hidden_size', n_intermediate: 'intermediate_size', n_layer: 'num_hidden_layers',
  n_head: 'num_attention_heads', n_key_value_heads: 'num_key_value_heads', n_ctx: 'max_position_embeddings',
  rotary_base: 'rope_theta', attn_bias: 'attention_bias',
};

/** Where there is no config.json: what the original's trainer leaves, model_config.yaml, lines of `key: scalar`. */
export function readYaml(dir: string): [file: string, config: Config] | undefined {
  const yaml = path.join(dir, 'model_config.yaml');
  if (fs.existsSync(path.join(dir, 'config.json')) || !fs.existsSync(yaml)) return undefined;
  const config: Record<string, unknown> = {};
  const text = orRefuse(yaml, () => fs.readFileSync(yaml, 'utf8'));
  for (const [, key = '', value = ''] of text.matchAll(/^(\w+): *(.*?) *\r?$/gm)) {
    config[YAML_KEYS[key] ?? key] = /^(-?[\d.]+(e-?\d+)?|true|false|null)$/.test(value) ? JSON.parse(value) : value;
  }
  if (config.model_type === 'LlamaSimpleMLP') config.model_type = 'llama_simple_mlp';
  return [yaml, config];
}

/** model.safetensors, or the shards that its index names, or the paper's own model_step_<n>.safetensors. */
export function weightFiles(dir: string): string[] {
  const all = fs.readdirSync(dir);
  let names: string[] = all.filter(f => f === 'model.safetensors');
  const index = path.join(dir, 'model.safetensors.index.json');
  if (names.length === 0 && fs.existsSync(index)) {
    names = [...new Set(Object.values(readObject(index).weight_map ?? {}).map(String))];
    const odd = names.find(name => !/^[\w-][\w.-]*\.safetensors$/.test(name));
    if (odd !== undefined) refuse(`${index}: ${JSON.stringify(odd)} is not the name of a shard in this folder`);
  }
  if (names.length === 0) names = all.filter(f => /^model_step_\d+\.safetensors$/.test(f));
  if (names.length > 1 && all.includes(names[0]!) && !fs.existsSync(index))
    refuse(`${dir}: several checkpoints, ${names}`);
  if (names.length === 0 && all.includes('adapter_config.json'))
    refuse(`${dir}: holds an adapter, not a model; merge it into its base model and give that folder`);
  if (names.length === 0) refuse(`${dir}: no model.safetensors, and no model.safetensors.index.json`);
  return names;
}

// ---- The tensors of a folder ----

/** What torch.compile, DataParallel, FSDP and activation checkpointing write into the names of what they wrap. */
const WRAPPERS = ['_orig_mod', 'module', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'];
const unwrapped = (name: string) => name.split('.').filter(part => !WRAPPERS.includes(part));

/** Buffers that no forward needs: they are computed from the config. */
const BUFFERS = /\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(bias|masked_bias)|[kv]_scale)$/;

/**
 * Finds tensors by the names that the architecture implies. Stored names may have wrappers in them and a prefix before
 * them (gpt2's `transformer.`, for instance), and may lack the base model's own prefix, as embedding models do: where
 * the file has one embedding, the words before its name are those before all others.
 * @returns the stored name, or undefined
 */
function storedNames(names: Names, stored: Iterable<string>, dir: string): (name: string) => string | undefined {
  const byName = new Map<string, string>();
  for (const name of stored) {
    const plain = unwrapped(name).join('.');
    const twin = byName.get(plain);
    if (twin !== undefined) refuse(`${dir}: ${twin} and ${name} are two tensors of one name, but for a wrapper's`);
    byName.set(plain, name);
  }
  const base = names.embed.slice(0, names.embed.lastIndexOf('.') + 1); // `model.` in Llamas
  const embed = `${names.embed.slice(base.length)}.weight`;
  const found = [...byName.keys()].filter(name => name === embed || name.endsWith(`.${embed}`));
  const prefixes = found.map(name => name.slice(0, -embed.length));
  if (prefixes.length > 1 && !prefixes.includes(base))
    refuse(`${dir}: which of ${found.slice(0, 3).join(', ')} is ${names.embed}.weight?`);
  const prefix = prefixes.includes(base) ? base : (prefixes[0] ?? base);
  const outer = prefix.replace(/[^.]+\.$/, ''); // where the head is: beside the base model
  return name => {
    const isHead = name === `${names.head}.weight`;
    const heads = [outer, prefix].flatMap(before => [before + name, `${before}lm_head.weight`]); // gpt_neox has two names
    const wanted = isHead ? heads : [prefix + name.slice(base.length)];
    return wanted.map(name => byName.get(name)).find(name => name !== undefined);
  };
}

/** The name that has most in common with the one that is missing. */
function nearest(name: string, stored: Iterable<string>): string | undefined {
  const parts = name.split('.');
  const common = (other: string) => other.split('.').filter(part => parts.includes(part)).length;
  return [...stored].sort((a, b) => common(b) - common(a))[0];
}

/**
 * Opens a Hugging Face folder (or what the original's trainer leaves): its config, and its tensors by the names that
 * the architecture implies.
 * @param own the names of the families that the file itself knows
 * @param say is told of tensors that are not used
 * @throws UsageError naming the file, field or tensor that is wrong
 */
export async function openModel(dir: string, own: OwnNames, say: (line: string) => void) {
  if (!fs.statSync(dir, { throwIfNoEntry: false })?.isDirectory()) refuse(`${dir}: no such folder`);
  const json = path.join(dir, 'config.json');
  const [configFile, config] = readYaml(dir) ?? [json, readObject(json)];
  const arch = readArchitecture(config, configFile, own);
  const tokenizer = path.join(dir, 'tokenizer.json');
  if (fs.existsSync(tokenizer)) readObject(tokenizer); // refused here, before a long load
  const hash = crypto.createHash('sha256').update(fs.readFileSync(configFile));
  const { tensors, readFloat32, close: closeShards } = await openShards(weightFiles(dir).map(f => path.join(dir, f)));
  const unread = new Map([...tensors.keys()].map(name => [name, unwrapped(name).join('.')]));
  let open = true;
  const close = () => {
    if (open) closeShards();
    open = false;
  };
  const orClose = <X>(job: () => X): X => {
    try {
      return job();
    } catch (error) {
      close();
      throw error;
    }
  };
  const stored = orClose(() => storedNames(arch.names, tensors.keys(), dir));
  const owners = new Set([`${arch.names.head}.`]); // layers, as the stored names have them

  /** Whether there is such a tensor; of a bias: whether config.json implies one, which must then be there. */
  const has = (name: string): boolean => {
    if (!name.endsWith('.bias')) return stored(name) !== undefined;
    const layer = name.slice(0, -'.bias'.length);
    const { embed, positions, head } = arch.names;
    if ([embed, positions, head].includes(layer)) return false; // gpt2 has biases everywhere else
    const isNorm = [arch.names.norm1, arch.names.norm2, arch.names.last].some(n => `.${layer}`.endsWith(`.${n}`));
    return isNorm ? arch.norm === 'layer' : arch.biased.test(layer);
  };

  /** The numbers of a tensor, row by row. */
  const read = (name: string, shape: readonly number[]): Float32Array => {
    const source = stored(name);
    if (source === undefined) {
      const untied = name === `${arch.names.head}.weight` ? ', and tie_word_embeddings is not true' : '';
      return refuse(`${dir}: no tensor ${name}${untied}; there is, for example, ${nearest(name, tensors.keys())}`);
    }
    const got = tensors.get(source)!.shape;
    if (got.join() !== shape.join()) refuse(`${dir}: ${source} is [${got}], config.json implies [${shape}]`);
    const data = readFloat32(source);
    for (let i = 0; i < data.length; i++)
      if (!Number.isFinite(data[i])) refuse(`${dir}: ${source} holds ${data[i]}; these weights can't be used`);
    hash.update(source).update(data);
    owners.add(unread.get(source)!.replace(/[^.]+$/, ''));
    unread.delete(source);
    return data;
  };

  /** What is left changes nothing (then it is said), or it belongs to a layer that it would change. */
  const finish = (): string => {
    close();
    const others = [...unread].filter(([, name]) => !BUFFERS.test(name));
    for (const [name, plain] of others) {
      const owner = [...owners].find(layer => plain.startsWith(layer));
      if (owner !== undefined && plain !== `${owner}bias`)
        refuse(
          `${dir}: ${name} changes what ${owner.slice(0, -1)} computes (an adapter, a scale): not done here; merge it`,
        );
    }
    const kinds = new Map<string, string[]>();
    for (const [name] of others) {
      const kind = name.replace(/\.\d+\./g, '.*.');
      kinds.set(kind, [...(kinds.get(kind) ?? []), name]);
    }
    const list = [...kinds.values()].map(
      ([first, ...more]) => first + (more.length ? ` and ${more.length} like it` : ''),
    );
    const rest = list.length > 6 ? `, and ${list.length - 6} other kinds` : '';
    if (list.length > 0) say(`warning  ${dir}: config.json implies no ${list.slice(0, 6).join(', ')}${rest}: not used`);
    return hash.digest('hex');
  };
  return { arch, config, has, read: (...args: Parameters<typeof read>) => orClose(() => read(...args)), finish, close };
}
