# find_package(epskernels) gives the target epskernels::epskernels: libepskernels.so of this installation. To link to it is to
# load it, and to load it is to have the ops torch.ops.epskernels.*, without Python. libtorch is for the program to find.
get_filename_component(_epskernels_folder "${CMAKE_CURRENT_LIST_DIR}" DIRECTORY)
set(_epskernels_library "${_epskernels_folder}/libepskernels.so")
if(NOT EXISTS "${_epskernels_library}")
  set(epskernels_FOUND FALSE)
  set(epskernels_NOT_FOUND_MESSAGE "${_epskernels_library} is missing: this installation of epskernels was not compiled; `epskernels info` says why")
  return()
endif()
if(NOT TARGET epskernels::epskernels)
  add_library(epskernels::epskernels SHARED IMPORTED)
  # No symbol of it is called by name, and a linker would leave it out for that.
  set_target_properties(epskernels::epskernels PROPERTIES
    IMPORTED_LOCATION "${_epskernels_library}" INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
endif()
