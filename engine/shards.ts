import * as tf from '@tensorflow/tfjs';

type Tensors = Record<string, tf.Tensor>;
type Compile = <F extends Tensors, O extends Tensors>(name: string, fn: (feeds: F) => O) => (feeds: F) => Promise<O>;
type Rows<X> = { s: X; m: X; v: X };
interface Result<Group extends string> {
  losses: tf.Tensor; // [losses]
  l0: tf.Tensor; // a scalar
  gradients: Record<Group, tf.Tensor>;
  sources: Rows<tf.Tensor>;
}

/**
 * Gradient accumulation, so that a batch fits which would not as a whole: it comes in R shards, one after another. Each
 * shard has its own rows of the sources [N,·], which move with it; losses and gradients are averaged over the shards
 * before `update` moves the parameters.
 * @param nLosses how many losses there are
 * @param empty the shapes of the gradients
 * @returns a step, which is given the feeds of each shard
 */
export function accumulate<Feeds extends Tensors, Group extends string>(
  compile: Compile,
  R: number,
  nLosses: number,
  sources: Rows<tf.Variable>,
  empty: Record<Group, number[]>,
  forward: (feeds: Feeds, old: Rows<tf.Tensor>) => Result<Group>,
  update: (result: Omit<Result<Group>, 'sources'>, feeds: Feeds) => Tensors,
): (feedsOf: (shard: number) => Feeds) => Promise<Tensors> {
  const parts = ['s', 'm', 'v'] as const;
  const n = sources.s.shape[0]! / R; // positions of a shard
  const groups = Object.entries<number[]>(empty);
  const zeros = (shape: number[]) => tf.tidy(() => tf.variable(tf.zeros(shape), false));
  const summed = Object.fromEntries(groups.map(([group, shape]) => [group, zeros(shape)])) as Record<
    Group,
    tf.Variable
  >;
  const addShard = compile('shard', ({ index, values, ...rest }: Record<'index' | 'values', tf.Tensor>) => {
    const first = tf.mul(index, tf.scalar(n, 'int32'));
    const rows = tf.add(tf.range(0, n, 1, 'int32'), first) as tf.Tensor1D;
    const [s, m, v] = parts.map(part => tf.gather(sources[part], rows)) as unknown as [tf.Tensor, tf.Tensor, tf.Tensor];
    const result = forward(rest as unknown as Feeds, { s, m, v });
    for (const part of parts) {
      const moved = tf.tensorScatterUpdate(sources[part], rows.reshape([n, 1]), result.sources[part]);
      sources[part].assign(moved);
    }
    for (const [group] of groups) {
      const total = summed[group as Group];
      total.assign(tf.add(total, tf.div(result.gradients[group as Group], R)));
    }
    const ofShard = tf.concat([result.losses, result.l0.reshape([1])]);
    return { values: tf.add(values, tf.div(ofShard, R)) };
  });
  const finish = compile('update', ({ values, ...rest }: Record<'values', tf.Tensor>) => {
    const [losses, l0] = tf.split(values, [values.size - 1, 1]) as [tf.Tensor, tf.Tensor];
    const metrics = update({ losses, l0: l0.reshape([]), gradients: summed }, rest as unknown as Feeds);
    for (const [group] of groups) summed[group as Group].assign(tf.zerosLike(summed[group as Group]));
    return metrics;
  });
  return async feedsOf => {
    let feeds = feedsOf(0);
    let values: tf.Tensor = tf.zeros([nLosses + 1]); // the losses and L0 of the shards so far
    for (let r = 0; r < R; r++) {
      if (r > 0) feeds = feedsOf(r);
      ({ values } = await addShard({ ...feeds, index: tf.scalar(r, 'int32'), values }));
    }
    return finish({ ...feeds, values });
  };
}
