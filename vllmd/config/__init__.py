"""The configuration: one table of settings, and the loader.

nodes      YAML as nodes that know file, line and column
value_types kinds of values: parser, words, JSON Schema
types      the configuration as frozen dataclasses
settings   THE TABLE; everything else is drawn from it
sources    files, environment, command line -> trees of nodes
shape      the table's shape put upon a tree
trees      pure functions on trees
loader     all of that, and parsing -> Config
findings   problems and warnings
origins    where each setting was given
checks     what spans several settings
as_daemon  what the daemon's user cannot read of it
unfit      what keeps a model from ever being loaded on the devices
replicas   the engines that this machine is to have
runtime_model a model's settings from a program instead of a file
secrets    keys and tokens kept in files
schema     the table as JSON Schema
conversion other systems' configurations
edit       a change to a file that a person wrote
present    what is in effect, as YAML
names      model names made safe for units and files
"""
