"""What a traced program consists of."""

import jax


def equations(jaxpr):
    """Every equation of a jaxpr and of all those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from equations(value)


def kept(function, *args):
    """Shapes and types of what a gradient keeps of a function, its arguments left out."""
    arrays = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *args))
    given = [(x.shape, x.dtype) for x in jax.tree.leaves(args)]
    found = [(x.shape, x.dtype) for x in arrays if x.ndim]
    for one in given:
        if one in found:
            found.remove(one)
    return found
