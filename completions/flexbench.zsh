#compdef flexbench

_flexbench_completion() {
  eval $(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _FLEXBENCH_COMPLETE=complete_zsh flexbench)
}

compdef _flexbench_completion flexbench

