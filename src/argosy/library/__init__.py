"""The library: find models by name, wherever programs on this machine keep them.

places  the caches of the hub, LM Studio and Ollama  ->  models, used in place
names   a name, a part of one or an alias            ->  one model
kept    aliases, when a model was last used, what was pulled: one small file per user
pull    a repository of a hub                        ->  files in the hub's cache
remove  a model                                      ->  the files to delete, and whose they are
"""
