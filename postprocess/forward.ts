/**
 * The component form of a language model's forward, with stopped gradients: what every attribution differentiates.
 *
 * Each decomposed layer is computed from its components with mask 1, y = Σ_c stop(a_c) U_c + x Δᵀ + b, where the inner
 * activation a_c = x·V_c is cut: the gradient of a later activation reaches it only by paths that pass no other
 * component (residual stream, norms, attention patterns, MLP nonlinearities, the delta component). With Δ, the forward
 * is the target's own; without it, it is what the components alone compute.
 *
 * A cut layer's output enters as a leaf o = Σ_c a_c U_c [N,dOut], so that ∂/∂a_c = U_c · ∂/∂o: the backward pass is as
 * wide as the layers, not as the components. This module is the only one that knows where a language model keeps its
 * embedding and its unembedding.
 */
import * as tf from '@tensorflow/tfjs';
import {
  type LanguageModel,
  type Linear,
  languageModel,
  type Module,
  matmul,
  ownLinear,
  type Params,
  type Problem,
  type T,
  U,
  V,
} from '../nano-param-decomp.ts';

/** A forward's values, of which any part may be replaced; tensors, so make and use it inside of a tidy. */
export interface ComponentForm {
  problem: Problem<LanguageModel>;
  params: Params;
  B: number;
  embedded: T<'N d'>; // what enters the first block
  inputs: T<'N dIn'>[]; // what each module reads
  acts: T<'N C'>[]; // inner activations a = x V of each module, unscaled
  outputs: T<'N dOut'>[]; // a U: the leaves, without delta and bias
  deltas: T<'dIn dOut'>[] | undefined; // Δᵀ of each module; undefined: left out
  final: T<'N d'>; // what the unembedding multiplies
}

/** Which module an attribution is of; 'output': the final normed residual, of which logits are linear functions. */
export type Reader = number | 'output';

/** W_U [vocab,d]: the head, or the embedding where they are tied. */
export function unembedding({ arch, weights }: LanguageModel): T<'vocab d'> {
  return weights.get(`${arch.names.head}.weight`) ?? weights.get(`${arch.names.embed}.weight`)!;
}

/** What enters the first block: the tokens' embeddings, with those of their positions where the target has them. */
function embeddings({ arch, weights }: LanguageModel, tokens: T<'B S'>): T<'N d'> {
  const [B = 0, S = 0] = tokens.shape;
  const own: T = tf.gather(weights.get(`${arch.names.embed}.weight`)!, tokens.flatten());
  const positions = arch.names.positions && weights.get(`${arch.names.positions}.weight`);
  return positions ? tf.add(own, tf.tile(tf.slice(positions, [0, 0], [S, arch.dModel]), [B, 1])) : own;
}

/** The same target with other weights, given by their keys in `weights`. */
export function withWeights(target: LanguageModel, changes: ReadonlyMap<string, T>): LanguageModel {
  const weights = new Map<string, T>([...target.weights, ...changes]);
  return languageModel({ ...target, weights: weights as unknown as LanguageModel['weights'] });
}

/** The target's forward from what enters its first block to the final normed residual [N,d]. */
function forwardFrom(target: LanguageModel, embedded: T<'N d'>, B: number, linear: Linear): T<'N d'> {
  const { names, dModel } = target.arch;
  // the same target, its embedding a table with a row per position, and the identity for a head
  const changes = new Map<string, T>([
    [`${names.embed}.weight`, embedded],
    [`${names.head}.weight`, tf.eye(dModel)],
  ]);
  const positions = names.positions && target.weights.get(`${names.positions}.weight`);
  if (positions) changes.set(`${names.positions}.weight`, tf.zerosLike(positions)); // they are in `embedded`
  const N = embedded.shape[0]!;
  const rows = tf.range(0, N, 1, 'int32').reshape([B, N / B]);
  return withWeights(target, changes).forward(rows, linear);
}

/** The form of the forward on tokens int32 [B,S], with the delta component or without. */
export function componentForm(
  problem: Problem<LanguageModel>,
  params: Params,
  tokens: T<'B S'>,
  withDelta: boolean,
): ComponentForm {
  const { target, modules } = problem;
  const B = tokens.shape[0]!;
  const embedded = embeddings(target, tokens);
  const delta = (m: Module): T => tf.sub(target.weights.get(m.path)!, matmul(V(params, m), U(params, m)));
  const deltas = withDelta ? modules.map(delta) : undefined;
  const form: ComponentForm = {
    problem,
    params,
    B,
    embedded,
    inputs: [],
    acts: [],
    outputs: [],
    deltas,
    final: embedded,
  };
  const own = ownLinear(target);
  const final = forwardFrom(target, embedded, B, (path, x) => {
    const i = modules.findIndex(m => m.path === path);
    if (i < 0) return own(path, x);
    form.inputs[i] = x;
    form.acts[i] = matmul(x, V(params, modules[i]!));
    form.outputs[i] = matmul(form.acts[i]!, U(params, modules[i]!));
    return layerOutput(form, i, x, form.outputs[i]!);
  });
  return { ...form, final };
}

/** y = o + x Δᵀ + b */
function layerOutput({ problem, deltas }: ComponentForm, i: number, x: T, output: T): T {
  const bias = problem.target.weights.get(`${problem.modules[i]!.path}.bias`);
  const y = deltas ? tf.add(output, matmul(x, deltas[i]!)) : output;
  return bias ? tf.add(y, bias) : y;
}

/** What a reader's weight multiplies, [N,dIn] or [N,d], as a function of the cut leaves. */
export function inputOf(form: ComponentForm, reader: Reader, embedded: T, outputs: readonly T[], B: number): T {
  const { target, modules } = form.problem;
  const index = new Map(modules.map((m, i) => [m.path, i]));
  const own = ownLinear(target);
  let reached: T | undefined;
  const final = forwardFrom(target, embedded, B, (path, x) => {
    const i = index.get(path);
    if (i !== undefined && i === reader) reached = x;
    // what comes after the reader doesn't matter: zeros are cheaper
    if (reached) return tf.zeros([x.shape[0]!, target.linears.find(l => l.path === path)!.dOut]);
    return i === undefined ? own(path, x) : layerOutput(form, i, x, outputs[i]!);
  });
  return reached ?? final;
}

/** Gradients of Σ upstream ⊙ input of the reader; undefined where no path leads to the leaf. */
export interface LeafGradients {
  embedded: T<'N d'> | undefined;
  outputs: (T<'N dOut'> | undefined)[]; // by module
}
/** One backward pass from what a reader reads; leaves and upstream [N,·] may be copies of the form's rows. */
export function leafGradients(
  form: ComponentForm,
  reader: Reader,
  leaves: { embedded: T; outputs: readonly T[]; B: number },
  upstream: T,
): LeafGradients {
  const { embedded, outputs, B } = leaves;
  const all = [embedded, ...outputs];
  // unlike tf.grads, the engine's own function doesn't mind leaves that the reader doesn't depend on
  const f = () => inputOf(form, reader, embedded, outputs, B);
  const { grads } = tf.engine().gradients(f, all as tf.Tensor[], upstream, true);
  const [first, ...others] = grads.map(g => g ?? undefined);
  return { embedded: first, outputs: others };
}

/** Whether a module's output reaches a reader across positions: keys and values reach the o of their own attention. */
export function acrossPositions({ problem }: ComponentForm, source: number, reader: Reader): boolean {
  if (reader === 'output') return false;
  const { arch } = problem.target;
  const { names, nLayers, qkv } = arch;
  const paths = [problem.modules[source]!.path, problem.modules[reader]!.path];
  for (let i = 0; i < nLayers; i++) {
    const at = (part: string | undefined) => `${names.blocks}.${i}.${part}`;
    if (paths[1] !== at(names.o)) continue;
    return (qkv === 'separate' ? [names.k, names.v] : [names.q]).some(part => paths[0] === at(part));
  }
  return false;
}

/** Modules in the network's order: their numbers. */
export function networkOrder({ target, modules }: Problem): number[] {
  const place = new Map(target.linears.map((l, i) => [l.path, i]));
  return [...modules.keys()].sort((a, b) => place.get(modules[a]!.path)! - place.get(modules[b]!.path)!);
}
