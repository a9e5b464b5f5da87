"""Experiments: many trainings, one question each. Commands, imported by nobody but imagenet/experiments/.

    compare                 which objective is best at equal arithmetic or time? (methods.py: what is compared)
    causes                  which part of a method does its error come from?
    relatives               do small changes to a method help, and when does one need the JVP? (differences.py)
    family                  noise, cost, bias and gradients of every objective (family_measures.py, family_plots.py)
    bound_over_training     W2 and its bounds, of several losses, as the loss falls
    seeds                   how good is the default over seeds?
    layers                  which layers are right when a gradient goes through a JVP?

sweep.py trains many models side by side for compare and seeds, variants.py one after another for causes and relatives.
"""
