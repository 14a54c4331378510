//! The `META` map: written by the agent for whoever inspects the maps; no program reads it.

use aya_ebpf::{btf_maps::Array, macros::btf_map};
use egress_common::Meta;

#[btf_map]
static META: Array<Meta, 1> = Array::new();
