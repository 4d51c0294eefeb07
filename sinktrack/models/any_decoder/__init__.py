"""Any PyTorch decoder: its blocks are named, and everything else is found by its arithmetic.

The residual stream is followed as a linear form: from the input of block 0 on, a tensor that is the
stream carries the factor of each of its terms (that input, and every write). Sums add the factors,
numbers multiply them. At every block P0's rows of the terms are added up and compared with the
stream that is there, so a term that was missed is found out whatever the code. Attention is met
where functions of torch compute it, or known by value: an operator whose output is that of causal
softmax attention of its arguments is one. Routed experts are told apart by running P0's rows again
without each of them.
"""
