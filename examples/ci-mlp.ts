/**
 * Another CI function, for networks without sequences: one small MLP per module, which reads what enters the module, or
 * one per component, which reads nothing but how strongly the component is driven (x·V_c), or only a linear map. Any
 * record of two functions does: the shapes of its parameters, and its logits. `newRun(target, data, changes, ciPerModule)`
 * takes it.
 */
import * as tf from '@tensorflow/tfjs';
import { type CiFunction, type Module, matmul, type T, type Tensors, V } from '../nano-param-decomp.ts';

/** The columns of [N,ΣdIn] that belong to each module. */
const perModule = (input: T<'N ΣdIn'>, modules: readonly Module[]) =>
  tf.split(
    input,
    modules.map(m => m.dIn),
    1,
  );
const layer = (params: Tensors, name: string, x: T) =>
  matmul(x, params[`ci_fn.${name}.weight`]!, true).add(params[`ci_fn.${name}.bias`]!);

/** z = W₂ relu(W₁ x + b₁) + b₂ of each module; the hidden width is `ciMlpHidden`. */
export const ciPerModule: CiFunction = {
  shapes({ modules, config: { ciMlpHidden: hidden } }) {
    const shapes = modules.map(({ path, dIn, C }) => ({
      [`ci_fn.${path}.0.weight`]: [hidden, dIn],
      [`ci_fn.${path}.0.bias`]: [hidden],
      [`ci_fn.${path}.1.weight`]: [C, hidden],
      [`ci_fn.${path}.1.bias`]: [C],
    }));
    return Object.assign({}, ...shapes);
  },
  logits({ modules }, params, input) {
    const parts = perModule(input, modules);
    const z = modules.map(({ path }, i) => layer(params, `${path}.1`, layer(params, `${path}.0`, parts[i]!).relu()));
    return tf.concat(z, 1);
  },
};

/** The same for each component alone; of width `ciMlpHidden` too, and its only input is the number x·V_c. */
export const ciPerComponent: CiFunction = {
  shapes({ modules, config: { ciMlpHidden: hidden } }) {
    const shapes = modules.map(({ path, C }) => ({
      [`ci_fn.${path}.0.weight`]: [C * hidden, 1],
      [`ci_fn.${path}.0.bias`]: [C * hidden],
      [`ci_fn.${path}.1.weight`]: [C, hidden],
      [`ci_fn.${path}.1.bias`]: [C],
    }));
    return Object.assign({}, ...shapes);
  },
  logits({ modules }, params, input) {
    const parts = perModule(input, modules);
    const z = modules.map((m, i) => {
      const driven: T<'N C 1'> = matmul(parts[i]!, V(params, m)).reshape([-1, m.C, 1]);
      const weight = (name: string) => params[`ci_fn.${m.path}.${name}`]!.reshape([1, m.C, -1]);
      const h: T<'N C hidden'> = driven.mul(weight('0.weight')).add(weight('0.bias')).relu();
      return h.mul(weight('1.weight')).sum(2).add(params[`ci_fn.${m.path}.1.bias`]!);
    });
    return tf.concat(z, 1);
  },
};

/**
 * The plainest one: z = W (x / 5) + b, a threshold along one direction of what enters the module. The numbers in x are of
 * size 1 (RMS-normed), and Adam moves every weight by as much as the learning rate: with a wide x, z would jump far over
 * [0, 1] in a step, to where its importance has no slope. Hence the division.
 */
export const ciLinear: CiFunction = {
  shapes({ modules }) {
    const shapes = modules.map(({ path, dIn, C }) => ({
      [`ci_fn.${path}.weight`]: [C, dIn],
      [`ci_fn.${path}.bias`]: [C],
    }));
    return Object.assign({}, ...shapes);
  },
  logits({ modules }, params, input) {
    const parts = perModule(input, modules);
    const z = modules.map(({ path }, i) => layer(params, path, parts[i]!.div(5)));
    return tf.concat(z, 1);
  },
};
